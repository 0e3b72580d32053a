"""Each truncation on affine velocities v_k = A_k·x + C_k + θ_k against its closed form, in float64; laws of the random ones."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowalign.objectives import KLPenalty
from flowalign.trainers.reward_update import divergences
from flowalign.truncations import (
    Chains,
    DirectAlign,
    EquallySpaced,
    LastSteps,
    LowVariance,
    OneStep,
    RandomSuffix,
    Sparse,
    TwoLeaps,
)
from samplers import ODE, DPMSolver, FlowSDE, RectifiedFlow, normal
from samplers.noise import generator

S, ROWS = 8, 5
SIGMAS = torch.tensor([1.0, 0.93, 0.81, 0.68, 0.5, 0.37, 0.2, 0.08, 0.0]).double()
STEPS = -SIGMAS.diff()
F64 = torch.float64


@dataclass
class Affine:
    """One shift θ_k per level; counts how often each level is evaluated, and how often with graph."""

    theta: Tensor = field(default_factory=lambda: normal((S,), 0, "theta").double().requires_grad_())
    slope: Tensor = field(default_factory=lambda: normal((S,), 0, "slope").double())
    calls: Counter = field(default_factory=Counter)

    def __call__(self, x: Tensor, sigma: Tensor, row: Tensor) -> Tensor:
        k = int((SIGMAS[:-1] - sigma[0]).abs().argmin())
        self.calls[k, torch.is_grad_enabled()] += 1
        return self.slope[k] * x + 0.3 + self.theta[k]

    def chains(self, kernel=None, noise=None, checkpoint: bool = False) -> Chains:
        x = normal((ROWS, 1), 0, "start").double()
        return Chains(
            self, x, SIGMAS, kernel or ODE(), RectifiedFlow(), lambda i: normal((ROWS, 1), 0, "copy", i).double(), noise or {},
            checkpoint,
        )  # fmt: skip

    def gradient(self, look: Tensor) -> Tensor:
        """[S] ∂(mean of the look)/∂θ."""
        (found,) = torch.autograd.grad(look.mean(), self.theta, allow_unused=True, retain_graph=True)
        return torch.zeros(S, dtype=F64) if found is None else found

    def end(self) -> Tensor:
        """x_S, by hand."""
        x = normal((ROWS, 1), 0, "start").double()
        for k in range(S):
            x = x - STEPS[k] * (self.slope[k] * x + 0.3 + self.theta[k])
        return x.detach()


def later(slope: Tensor) -> Tensor:
    """[S] Π_{j>k} (1 − Δ_j·A_j)."""
    factors = 1 - STEPS * slope
    return torch.stack([factors[k + 1 :].prod() for k in range(S)])


def rng(number: int = 0) -> np.random.Generator:
    return generator(number, "test")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def at(values: dict[int, float]) -> Tensor:
    found = torch.zeros(S, dtype=F64)
    for step, value in values.items():
        found[step] = value
    return found


# ---------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_last_steps_have_the_derivative_of_the_chain(count: int | None, checkpoint: bool) -> None:
    bed = Affine()
    outcome = LastSteps(count).run(bed.chains(checkpoint=checkpoint), rng())
    whole, first = -STEPS * later(bed.slope), S - (count or S)
    close(bed.gradient(outcome.looks[0]), torch.where(torch.arange(S) >= first, whole, 0.0))
    close(outcome.looks[0], bed.end())
    assert [visit.step for visit in outcome.visits] == list(range(first, S))


def test_one_step_has_minus_its_level() -> None:
    bed, part = Affine(), OneStep(0.4)
    stops = set()
    for number in range(20):
        stop = part.stop(rng(number), S)
        outcome = part.run(bed.chains(), rng(number))
        close(bed.gradient(outcome.looks[0]), at({stop: -float(SIGMAS[stop])}))
        stops.add(stop)
    assert stops == {5, 6, 7}


def test_equally_spaced_steps_have_minus_their_length() -> None:
    bed, part, found = Affine(), EquallySpaced(3, 0.4), set()
    for number in range(30):
        active, stop = part.steps(rng(number), S)
        outcome = part.run(bed.chains(), rng(number))
        expected = at({k: -float(SIGMAS[stop] if k == stop else STEPS[k]) for k in active})
        close(bed.gradient(outcome.looks[0]), expected)
        assert len(set(np.diff(active))) == 1 and active[-1] <= stop
        found.add((tuple(active), stop))
    assert {stop for _, stop in found} == {5, 6, 7} and any(stop in active for active, stop in found)


def test_sparse_steps_have_minus_their_length_times_the_gain_and_the_true_sample() -> None:
    bed, part = Affine(), Sparse(3, rescale=0.5)
    for number in range(10):
        active = part.active(rng(number), S)
        outcome = part.run(bed.chains(), rng(number))
        gain = 1 + 0.5 * (1 / float(STEPS[active].sum()) - 1)
        close(bed.gradient(outcome.looks[0]), at({k: -gain * float(STEPS[k]) for k in active}))
        close(outcome.looks[0].detach(), bed.end())


def test_two_leaps_have_their_derivative_the_true_sample_and_its_weight() -> None:
    bed, part, pairs = Affine(), TwoLeaps(0.3, 0.1), set()
    for number in range(10):
        bed.calls.clear()
        outcome = part.run(bed.chains(), rng(number))
        k, j = (visit.step for visit in outcome.visits)
        leap, level = float(SIGMAS[k] - SIGMAS[j]), float(SIGMAS[j])
        expected = at({k: -leap * (1 - 0.3 * level * float(bed.slope[j])), j: -level})
        close(bed.gradient(outcome.looks[0]), expected)
        close(outcome.looks[0].detach(), bed.end())
        assert sorted(step for step, _ in bed.calls) == list(range(S)) and bed.calls.total() == S
        states = torch.stack(LastSteps(S).run(bed.chains(), rng()).visits[j].x.detach().unbind())
        x_k = LastSteps(S).run(bed.chains(), rng()).visits[k].x.detach()
        predicted = x_k - leap * (bed.slope[k] * x_k + 0.3 + bed.theta[k].detach())
        d_j = (predicted - states).abs().mean(1).clamp(min=0.1)
        d_0 = (states - level * (bed.slope[j] * states + 0.3 + bed.theta[j].detach()) - bed.end()).abs().mean(1)
        close(outcome.weight, 1 / (d_j + d_0.clamp(min=0.1)))
        pairs.add((k, j))
    assert len(pairs) > 4


@pytest.mark.parametrize("with_sample", [True, False])
def test_low_variance_averages_the_last_step_over_copies(with_sample: bool) -> None:
    bed = Affine()
    outcome = LowVariance(2, with_sample).run(bed.chains(), rng())
    assert len(outcome.looks) == len(outcome.visits) == 2 + with_sample
    level, slope = float(SIGMAS[-2]), float(bed.slope[-1])
    for look in outcome.looks:
        close(bed.gradient(look), at({S - 1: -level}))
    for number, look in enumerate(outcome.looks[with_sample:]):
        noise = normal((ROWS, 1), 0, "copy", number).double()
        y = (1 - level) * bed.end() + level * noise
        close(look.detach(), y - level * (slope * y + 0.3 + bed.theta[-1].detach()))


def test_a_state_is_evaluated_once_and_only_active_steps_have_a_graph() -> None:
    for part in (LastSteps(2), LastSteps(None), RandomSuffix(), OneStep(), EquallySpaced(), Sparse(3), TwoLeaps()):
        bed = Affine()
        outcome = part.run(bed.chains(), rng(3))
        passes = part.passes(S)
        with_graph = sum(count for (_, graph), count in bed.calls.items() if graph)
        assert len({step for step, _ in bed.calls}) == bed.calls.total() <= passes.without + passes.graph
        assert with_graph == len(outcome.visits) <= passes.graph, part


# ---------------------------------------------------------------------------------------------- laws


def test_the_paper_keeps_a_suffix_of_uniform_length_and_the_code_each_step_by_itself() -> None:
    draws, suffix, independent = 6000, Counter(), np.zeros(S)
    for number in range(draws):
        active = RandomSuffix().active(rng(number), S)
        assert active == list(range(S - len(active), S))
        suffix[len(active)] += 1
        independent[RandomSuffix(independent=True).active(rng(number), S)] += 1
    assert all(abs(suffix[length] / draws - 1 / S) < 0.02 for length in range(1, S + 1))
    np.testing.assert_allclose(independent / draws, (np.arange(S) + 1) / (S + 1), atol=0.025)


def test_late_steps_are_drawn_more_often_by_sparse() -> None:
    counts = np.zeros(S)
    for number in range(4000):
        counts[Sparse(1, power=2.0).active(rng(number), S)] += 1
    weights = (np.arange(S) + 1.0) ** 2
    np.testing.assert_allclose(counts / 4000, weights / weights.sum(), atol=0.025)


# ---------------------------------------------------------------------------------------------- SRPO


def test_direct_align_recovers_the_sample_exactly_from_an_exact_velocity() -> None:
    sample, noise = normal((ROWS, 1), 1, "x").double(), normal((ROWS, 1), 2, "x").double()
    for start, stop in ((0.99, 0.95), (0.8, 0.75), (0.75, 0.8), (0.1, 0.0)):
        chains = replace(Affine().chains(), velocity=lambda x, sigma, row: noise - sample)
        recovered, visit = DirectAlign().recovered(chains, sample, noise, start, stop)
        torch.testing.assert_close(recovered, sample, rtol=0, atol=1e-12)
        # at the level of its input, where a regularizer evaluates its role, in whichever direction the step went
        assert float(visit.sigma) == pytest.approx(start) and visit.sigma_next < visit.sigma


@pytest.mark.parametrize(("start", "stop", "factor"), [(0.8, 0.75, -0.2), (0.75, 0.8, 0.25)])
def test_the_gain_of_direct_align_is_that_of_the_step(start: float, stop: float, factor: float) -> None:
    sample, noise, v = (normal((ROWS, 1), seed, "x").double() for seed in range(3))
    v.requires_grad_()
    chains = replace(Affine().chains(), velocity=lambda x, sigma, row: v)
    recovered, _ = DirectAlign().recovered(chains, sample, noise, start, stop)
    (gain,) = torch.autograd.grad(recovered.sum(), v)
    close(gain, torch.full_like(gain, factor))


def test_the_known_noise_is_that_which_the_sample_came_from() -> None:
    """With one velocity everywhere ε − x0 is that velocity, for no other ε."""
    chains = replace(Affine().chains(), velocity=lambda x, sigma, row: torch.full_like(x, 0.3))
    for number in range(4):
        (recovered,) = DirectAlign().run(chains, rng(number)).looks
        torch.testing.assert_close(recovered, (chains.x - 0.3).to(recovered), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("low", "plain", "inverted"), [(0.0001, 0.235, 0.039), (0.8999, 0.1, 0.3)])
def test_discounts_run_from_data_to_noise(low: float, plain: float, inverted: float) -> None:
    """SRPO.py at 81e5898: discount[mid_timestep], sigmas_l[num_inference_steps - mid_timestep], noise first in sigmas_l."""
    for inversion, k in ((0.0, plain), (1.0, inverted)):
        part = DirectAlign("good", "bad", low=low, high=low + 0.1, inversion=inversion)
        (first, _), _ = part.run(Affine().chains(), rng(0)).words
        assert first - 1 == pytest.approx(k, abs=1e-3)


def test_the_inversion_swaps_the_words_and_discounts_lie_between_their_ends() -> None:
    part, found = DirectAlign("good", "bad"), set()
    for number in range(40):
        outcome = part.run(Affine().chains(), rng(number))
        (first, text), (second, other) = outcome.words
        inverted = text == "bad. "
        low, high = (0.01, 0.3) if inverted else (0.1, 0.25)
        assert second == -1 and {text, other} == {"good. ", "bad. "} and low <= first - 1 <= high
        found.add(inverted)
    assert found == {True, False}
    assert all(DirectAlign("", "", inversion=0.0).run(Affine().chains(), rng(n)).words[0][1] == "" for n in range(3))


# ---------------------------------------------------------------------------------------------- the optimum with a path KL


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_under_a_path_kl_is_that_of_the_tilt(seed: int) -> None:
    """r = w·x_S − β·KL_path, reparametrized: θ*_k = ς_k²·α_{k+1}/(β·b_k), α_{k+1} = w·Π_{j>k} (a_j + b_j·A_j)."""
    kernel, w, beta, bed = FlowSDE(0.7, reduce="sum"), 1.3, 0.4, Affine()
    affine = kernel.coefficients(SIGMAS[:-1], SIGMAS[1:], 1.0, torch.arange(S))
    noise = {step: normal((ROWS, 1), seed, "step", step).double() for step in range(S)}
    maps = affine.alpha + affine.velocity_coef * bed.slope
    alpha = w * torch.stack([maps[k + 1 :].prod() for k in range(S)])
    optimum = affine.std.square() * alpha / (beta * affine.velocity_coef)

    def gradient(theta: Tensor) -> Tensor:
        with torch.no_grad():
            bed.theta.copy_(theta)
        outcome = LastSteps(None).run(bed.chains(kernel, noise), rng())
        base = [visit.v - bed.theta[visit.step] for visit in outcome.visits]
        kl = S * divergences(KLPenalty(beta, "exact"), kernel, outcome.visits, base)
        return bed.gradient(w * outcome.looks[0][:, 0] - beta * kl)

    curvature = beta * affine.velocity_coef.square() / affine.std.square()
    torch.testing.assert_close(gradient(optimum), torch.zeros(S, dtype=F64), rtol=0, atol=1e-11)
    somewhere = normal((S,), seed, "somewhere").double()
    torch.testing.assert_close(gradient(somewhere), curvature * (optimum - somewhere), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("count", [1, 2, 4])
def test_activations_are_those_of_the_active_steps_and_of_none_with_checkpointing(count: int) -> None:
    """Elements that autograd keeps of a wide network: `count` times those of one call; with checkpointing states only."""
    network = nn.Sequential(nn.Linear(1, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1)).double()

    def kept(part: LastSteps, checkpoint: bool) -> int:
        saved, weights = list[int](), {p.data_ptr() for p in network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                saved.append(tensor.numel())
            return tensor

        chains = replace(
            Affine().chains(checkpoint=checkpoint),
            velocity=lambda x, sigma, row: network(x),
            x=torch.ones(ROWS, 1).double(),
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            part.run(chains, rng())
        return sum(saved)

    one = kept(LastSteps(1), checkpoint=False)
    assert one > 2 * 256 * ROWS  # the network's activations
    assert kept(LastSteps(count), checkpoint=False) == pytest.approx(count * one, rel=0.02)
    assert kept(LastSteps(count), checkpoint=True) < 0.02 * one * count


@pytest.mark.parametrize(
    ("part", "steps"), [(LastSteps(9), S), (Sparse(9), S), (TwoLeaps(), 1), (RandomSuffix(9), S)], ids=str
)
def test_a_chain_that_is_too_short_is_refused(part, steps: int) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        part.passes(steps)


@pytest.mark.parametrize("part", [Sparse(2), TwoLeaps()], ids=str)
def test_jumps_over_noise_are_refused(part) -> None:
    with pytest.raises(ValueError, match=r"samplers\.Deterministic"):
        part.run(Affine().chains(FlowSDE(), {2: torch.zeros(ROWS, 1).double()}), rng())


def test_leaps_over_steps_that_use_the_ones_before_are_refused() -> None:
    """The chain would begin anew at both of its stops, and its end be another sample than that of the solver."""
    with pytest.raises(ValueError, match=r"depend on the ones before.*samplers\.ODE"):
        TwoLeaps().run(Affine().chains(DPMSolver(ODE())), rng())
