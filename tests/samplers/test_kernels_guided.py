"""Reward-guided kernels: exact shifts, exact tilts, what is scored, and gradients from values."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.distributions import Normal

from samplers import (
    CPS,
    DDIM,
    ODE,
    SPSA,
    AtPrediction,
    DanceSDE,
    DPMSolver,
    FlowSDE,
    Guided,
    Kernel,
    KeyedNoise,
    LinearSDE,
    RewardGradient,
    TransitionContext,
    Tree,
    chain,
    normal,
    plain_sigmas,
    rollout,
    spsa_gradient,
    window,
)
from tests.helpers.kernels import F64, FLOW, KERNELS, VP, bed, moments, path_of

X, V = torch.tensor([[0.3, -0.4], [1.2, 0.1], [0.0, 0.7]], dtype=F64), torch.tensor([[-1.1, 0.2]] * 3, dtype=F64)


@dataclass(frozen=True)
class Quadratic:
    """ρ = -½κ|x - m_row|², m = row: ∇ρ = -κ(x - m)."""

    kappa: float = 2.0

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return -0.5 * self.kappa * (x - rows.to(x)[:, None]).square().sum(1)


@dataclass(frozen=True)
class Tilt:
    """β·(log-tilt of the marginal) for data N(m, δ²) and clean reward c·x: c·E[x0 | x] and a constant."""

    m: float = 0.5
    delta: float = 0.8
    c: float = 1.0

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        sigma = sigma[:, None]
        variance = (1 - sigma) ** 2 * self.delta**2 + sigma**2
        return (self.c * (self.m + (1 - sigma) * self.delta**2 / variance * (x - (1 - sigma) * self.m))).sum(1)


class Counted:
    """A reward that records its calls."""

    def __init__(self, reward) -> None:
        self.reward, self.calls = reward, []

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.calls.append((x.detach().clone(), sigma, rows, x.dtype))
        return self.reward.score(x, sigma, rows)


ASCENT = RewardGradient(Quadratic())


# ---------------------------------------------------------------------------------------------- the shift


@pytest.mark.parametrize("use_delta", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_a_quadratic_reward_moves_the_mean_by_minus_lambda_kappa_times_the_gap(name: str, use_delta: bool) -> None:
    kernel, ctx = KERNELS[name], TransitionContext(roots=torch.tensor([4, 0, 2]))
    guided = Guided(kernel, ASCENT, scale=0.01, use_delta=use_delta)
    step, plain = guided(X, V, 0.7, 0.5, ctx), kernel(X, V, 0.7, 0.5, ctx)
    factor = 0.01 * (0.2 if use_delta else 1.0)
    gap = X - torch.tensor([[4.0], [0.0], [2.0]])
    torch.testing.assert_close(step.mean, plain.mean - factor * 2.0 * gap, rtol=0, atol=1e-15)
    assert torch.equal(step.policy.mean, plain.mean) and torch.equal(step.std, plain.std)
    arrived = step.sample(torch.ones_like(X))
    torch.testing.assert_close(arrived, step.mean + step.std[:, None])
    density = Normal(plain.mean, plain.std[:, None]).log_prob(arrived).mean(1)
    torch.testing.assert_close(step.log_prob(arrived), density)
    own = replace(guided, log_prob_mean="guided")(X, V, 0.7, 0.5, ctx)
    torch.testing.assert_close(own.log_prob(arrived), Normal(step.mean, step.std[:, None]).log_prob(arrived).mean(1))


@pytest.mark.parametrize("name", KERNELS)
def test_rates_of_the_three_forms(name: str) -> None:
    """score_half s²/2β and doob s²/β; full_tilt: the mean under the velocity of the tilted marginal, whose score is
    ∇ρ/β larger."""
    kernel, path = KERNELS[name], path_of(name)
    gradient, plain = -2.0 * X, kernel(X, V, 0.7, 0.5)
    ctx = TransitionContext(roots=torch.zeros(3, dtype=torch.int64))
    got = {form: Guided(kernel, ASCENT, form=form, beta=0.8, path=path)(X, V, 0.7, 0.5, ctx).mean
           for form in ("score_half", "doob", "full_tilt")}  # fmt: skip
    s2 = plain.std[:, None] ** 2
    torch.testing.assert_close(got["score_half"], plain.mean + s2 / 1.6 * gradient)
    torch.testing.assert_close(got["doob"], plain.mean + s2 / 0.8 * gradient)
    for form, mean in got.items():  # a rate that is not multiplied by h = 0.2
        whole = Guided(kernel, ASCENT, form=form, beta=0.8, path=path, use_delta=False)(X, V, 0.7, 0.5, ctx).mean
        torch.testing.assert_close(whole - plain.mean, (mean - plain.mean) / 0.2)
    score = path.score_from_velocity(X, V, 0.7) + gradient / 0.8
    tilted = kernel(X, path.velocity_from_score(X, score, 0.7), 0.7, 0.5)
    torch.testing.assert_close(got["full_tilt"], tilted.mean)


def test_the_released_scale_is_score_half_at_its_beta() -> None:
    """Dance η = .25, β = 3.125: η²/2β = .01 (2602.04928)."""
    ctx = TransitionContext(roots=torch.zeros(3, dtype=torch.int64))
    by_beta, by_scale = (Guided(DanceSDE(0.25), ASCENT, scale=s)(X, V, 0.7, 0.5, ctx).mean for s in (None, 0.01))
    torch.testing.assert_close(by_beta, by_scale)


def test_a_normalized_gradient_has_each_rows_own_norm() -> None:
    ctx = TransitionContext(roots=torch.tensor([0, 0, 3]))
    guided = Guided(DanceSDE(), ASCENT, scale=0.5, use_delta=False, normalize=True)
    moved = (guided(X, V, 0.7, 0.5, ctx).mean - DanceSDE()(X, V, 0.7, 0.5).mean).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((3,), 0.5, dtype=F64))
    alone = guided(X[1:2], V[1:2], 0.7, 0.5, TransitionContext(roots=torch.tensor([0])))
    torch.testing.assert_close(alone.mean, guided(X, V, 0.7, 0.5, ctx).mean[1:2], rtol=0, atol=0)
    at_top = guided(torch.zeros(1, 2, dtype=F64), V[:1], 0.7, 0.5, TransitionContext(roots=torch.tensor([0])))
    assert bool(at_top.mean.isfinite().all())  # no gradient, no direction


@pytest.mark.parametrize(
    "guided",
    [
        lambda kernel: Guided(kernel, ASCENT, scale=0.0),
        lambda kernel: Guided(kernel, ASCENT, scale=1.0, start=5),
        lambda kernel: Guided(kernel, ASCENT, scale=1.0, start=1, interval=2),
        lambda kernel: Guided(kernel, ASCENT, scale=1.0, end=3),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_without_guidance_it_is_the_kernel_bit_for_bit(name: str, guided) -> None:
    step = torch.tensor([4, 4, 4])
    x, v = X.float(), V.float()
    got, plain = (k(x, v, 0.7, 0.5, TransitionContext(step=step)) for k in (guided(KERNELS[name]), KERNELS[name]))
    assert torch.equal(got.mean, plain.mean) and torch.equal(got.sample(x), plain.sample(x))
    assert torch.equal(got.log_prob(v), plain.log_prob(v))


def test_active_steps() -> None:
    guided = Guided(DanceSDE(), ASCENT, scale=1.0, start=2, end=7, interval=3)
    x, v = X[:1].expand(10, 2), V[:1].expand(10, 2)
    ctx = TransitionContext(step=torch.arange(10), roots=torch.zeros(10, dtype=torch.int64))
    moved = (guided(x, v, 0.7, 0.5, ctx).mean != DanceSDE()(x, v, 0.7, 0.5).mean).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 5]


# ---------------------------------------------------------------------------------------------- tilted laws


def shares(kernel: Kernel, beta: float, steps: int = 800) -> tuple[dict[str, float], dict[str, float]]:
    """For each form: the fraction of the full mean shift c·δ²/β that it reaches, and the final mean; exact recursion.

    The start is the exact marginal at the first σ < 1, tilted, since ρ_σ is not yet 0 there."""
    velocity, marginal = bed(FLOW)
    grid = plain_sigmas(steps, 1.0).double()[1:].tolist()
    ends = {}
    for form in ("none", "score_half", "doob", "full_tilt"):
        guided = kernel if form == "none" else Guided(kernel, RewardGradient(Tilt()), form=form, beta=beta)
        mean, variance = (1 - grid[0]) * 0.5, marginal(grid[0])
        for sigma, then in itertools.pairwise(grid):
            mean, variance = moments(guided, velocity, mean, variance, sigma, then)
        ends[form] = mean
    return {form: (end - ends["none"]) / (0.64 / beta) for form, end in ends.items()}, ends


def test_how_much_of_the_tilt_each_form_reaches() -> None:
    """Flow-SDE a = .7, m = .5, δ = .8, c = 1, β = .7: target mean 1.4143. The fractions are (a²/2)/(1+a²/2) =
    19.7 %, a²/(1+a²/2) = 39.4 % and 1; within 0.3 %, the discretization of 800 steps."""
    fraction, mean = shares(FlowSDE(0.7), 0.7)
    assert mean["none"] == pytest.approx(0.5, abs=1e-9)
    assert fraction["score_half"] == pytest.approx(0.245 / 1.245, abs=3e-3)
    assert fraction["doob"] == pytest.approx(0.49 / 1.245, abs=3e-3)
    assert fraction["full_tilt"] == pytest.approx(1.0, abs=3e-3)
    expected = {"score_half": 0.679, "doob": 0.860, "full_tilt": 1.415}
    assert {form: mean[form] for form in expected} == pytest.approx(expected, abs=3e-3)


def test_doob_is_the_full_tilt_of_the_memoryless_schedule_and_the_ode_needs_full_tilt() -> None:
    memoryless, _ = shares(FlowSDE(2**0.5), 0.7)
    assert memoryless["doob"] == pytest.approx(1.0, abs=5e-3)
    assert memoryless["full_tilt"] == pytest.approx(memoryless["doob"], abs=5e-3)
    ode, _ = shares(ODE(), 0.7)
    assert ode["full_tilt"] == pytest.approx(1.0, abs=3e-3)
    assert ode["score_half"] == ode["doob"] == 0


@pytest.mark.parametrize("form", ["score_half", "full_tilt"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_distilled_velocity_makes_the_kernels_own_mean_the_guided_one(name: str, form) -> None:
    """v + shift/b, for every kernel."""
    kernel = KERNELS[name]
    guided = Guided(kernel, ASCENT, form=form, beta=0.5, path=path_of(name))
    plain, ctx = kernel(X, V, 0.7, 0.5), TransitionContext()
    shift = guided.shift(plain, X, V, 0.7, ctx)
    assert shift is not None and float(shift.abs().max()) > 1e-3
    target = V + shift / plain.policy.velocity_coef[:, None]
    torch.testing.assert_close(kernel(X, target, 0.7, 0.5).mean, guided(X, V, 0.7, 0.5, ctx).mean)


# ---------------------------------------------------------------------------------------------- gradients, replay


def test_the_network_is_detached_and_the_policy_gradient_gains_the_guidance() -> None:
    """∂log π/∂v = (b/s)(z + λ∇ρ/s)/D: nothing flows through ∇ρ, in either mode."""
    x, z = X.clone().requires_grad_(), torch.tensor([[0.5, -1.0]] * 3, dtype=F64)
    for mode, extra in (("unguided", 1.0), ("guided", 0.0)):
        v = V.clone().requires_grad_()
        guided = Guided(FlowSDE(), ASCENT, scale=0.5, log_prob_mean=mode)
        step = guided(x, v, 0.7, 0.5, TransitionContext())
        arrived = step.sample(z).detach()
        (gradient,) = torch.autograd.grad(step.log_prob(arrived).sum(), v)
        shift = (step.mean - FlowSDE()(X, V, 0.7, 0.5).mean).detach()
        b, s = step.policy.velocity_coef[:, None], step.std[:, None]
        torch.testing.assert_close(gradient, (b / s) * (z + extra * shift / s) / 2)
    (velocity_coef,) = torch.autograd.grad(guided(X, v, 0.7, 0.5).mean.sum(), v)
    torch.testing.assert_close(velocity_coef, step.policy.velocity_coef[:, None].expand(3, 2))


def test_the_reward_runs_in_fp32_under_autocast() -> None:
    weight = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))

    @dataclass(frozen=True)
    class Net:
        def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return torch.tanh(x @ weight).sum(1)

    counted = Counted(Net())
    x = X.to(torch.bfloat16)
    at = (x, V.to(torch.bfloat16), torch.full((3,), 0.7), torch.arange(3), torch.arange(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = RewardGradient(counted).gradient(*at)
    assert counted.calls[0][3] == torch.float32 and got.dtype == torch.float32
    torch.testing.assert_close(got, (1 - torch.tanh(x.float() @ weight) ** 2) @ weight.T)
    torch.testing.assert_close(RewardGradient(Net(), micro_batch=2).gradient(*at), got)


@pytest.mark.parametrize("mode", ["unguided", "guided"])
@pytest.mark.parametrize("inner", [FlowSDE(0.7), DPMSolver(CPS(0.7, constants="full"))], ids=["flow", "dpm cps"])
def test_a_guided_rollout_replays(inner: Kernel, mode) -> None:
    """Ratio 1 in both modes; each distinct state's gradient is computed once, with its own condition row; a replay
    under the unguided mean computes none."""
    counted = Counted(Quadratic())
    kernel = Guided(inner, RewardGradient(counted), scale=0.3, start=1, end=3, log_prob_mean=mode)
    tree = Tree.cat([window(6, 4, 2, 2), chain(6, 3)])
    noise = KeyedNoise(0, 0, [0, 1], (2,))
    grid = plain_sigmas(6)
    forest = rollout(lambda x, s, r: -0.3 * x, noise.start(tree), grid, tree, kernel, noise.step)
    inside = tree.evaluated[(tree.index[tree.evaluated] >= 1) & (tree.index[tree.evaluated] <= 3)]
    scored = torch.cat([rows for _, _, rows, _ in counted.calls])
    assert len(scored) == len(inside) == (1 + 1 + 4) + 3 * 3  # the window's trunk, its four branches; three chains
    assert scored.bincount().tolist() == tree.root[inside].bincount().tolist()
    count = len(counted.calls)
    edges = tree.edges.flip(0)
    parents, position = tree.distinct_parents(edges)
    step = forest.edge_steps(edges, -0.3 * forest.at(parents), position)
    assert float((step.log_prob(forest.at(edges)) - forest.log_prob[edges]).abs().max()) <= 1e-6
    assert (len(counted.calls) > count) == (mode == "guided")
    unguided = rollout(lambda x, s, r: -0.3 * x, noise.start(tree), grid, tree, inner, noise.step)
    assert float((forest.at(tree.leaves) - unguided.at(tree.leaves)).abs().min()) > 1e-3


def test_guidance_raises_the_reward_of_a_rollout() -> None:
    velocity, _ = bed(FLOW)
    noise, tree = KeyedNoise(0, 0, [0], (1,)), chain(10, 64)
    start = noise.start(tree).double()
    ends = [
        rollout(velocity, start, plain_sigmas(10).double(), tree, kernel, noise.step, store_dtype=F64)
        for kernel in (FlowSDE(), Guided(FlowSDE(), RewardGradient(Tilt()), beta=0.7))
    ]
    assert float((ends[1].at(tree.leaves) - ends[0].at(tree.leaves)).min()) > 0.05


# ---------------------------------------------------------------------------------------------- SPSA


def test_spsa_is_unbiased_on_linear_and_quadratic_rewards() -> None:
    """f = g·x - ½κ|x|²: exactly ∇f·u per draw, so the mean over 40,000 draws is ∇f within 5 standard errors, whose
    variance |∇f|² + ∇f_d² is the closed form of one draw."""
    velocity_coef = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    x0 = torch.tensor([[0.3, -0.2, 0.1], [0.0, 1.0, 0.4]], dtype=F64)
    count = 40_000
    noise = normal((count, 2, 3), 0, "spsa").double()
    for kappa in (0.0, 1.5):
        exact = velocity_coef - kappa * x0

        def score(x: Tensor, kappa: float = kappa) -> Tensor:
            return x @ velocity_coef - 0.5 * kappa * x.square().sum(1)

        one = spsa_gradient(score, x0, noise[:1], tau=0.01)
        torch.testing.assert_close(one, (exact * noise[0]).sum(1, keepdim=True) * noise[0], rtol=1e-9, atol=1e-9)
        got = spsa_gradient(score, x0, noise, tau=0.5)  # exact at any τ for these
        variance = exact.square().sum(1, keepdim=True) + exact.square()
        assert bool(((got - exact).abs() < 5 * (variance / count).sqrt()).all())
        draws = torch.stack([spsa_gradient(score, x0, noise[i : i + 1], tau=0.5) for i in range(2000)])
        torch.testing.assert_close(draws.var(0), variance, rtol=0.25, atol=0)


def test_spsa_guides_at_the_predicted_clean_latent_with_noise_of_the_state() -> None:
    def keyed(nodes: Tensor) -> Tensor:
        return torch.stack([normal((8, 2), 5, "spsa", int(node)) for node in nodes], 1)

    counted = Counted(Quadratic())
    guided = Guided(DanceSDE(), AtPrediction(SPSA(counted, keyed)), scale=1.0, use_delta=False)
    ctx = TransitionContext(
        roots=torch.tensor([1, 1, 0]), parents=torch.tensor([7, 7, 9]), nodes=torch.tensor([11, 12, 13])
    )
    x, v = X[[0, 0, 2]], V[[0, 0, 2]]
    shift = guided(x, v, 0.7, 0.5, ctx).mean - DanceSDE()(x, v, 0.7, 0.5).mean
    assert torch.equal(shift[0], shift[1]) and len(counted.calls[0][0]) == 2  # siblings: one state
    x0 = X[[0, 2]] - 0.7 * V[[0, 2]]
    torch.testing.assert_close(counted.calls[0][0], x0 + 0.01 * keyed(torch.tensor([7, 9]))[0].double())
    assert counted.calls[0][1].tolist() == [0, 0] and counted.calls[0][2].tolist() == [1, 0]
    u, gradient = keyed(torch.tensor([7, 9])).double(), -2 * (x0 - torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(shift[[0, 2]], ((u * gradient).sum(2, keepdim=True) * u).mean(0))


# ---------------------------------------------------------------------------------------------- building, refusing


def test_bind_binds_the_kernel_and_the_guide_to_the_path() -> None:
    guided = Guided(DPMSolver(DDIM(0.6)), ASCENT, form="full_tilt").bind(VP)
    assert guided == Guided(DPMSolver(DDIM(0.6, VP), path=VP), ASCENT, form="full_tilt", path=VP)
    with pytest.raises(ValueError, match="rectified flow"):
        Guided(FlowSDE(), ASCENT).bind(VP)


def test_yaml_builds_all_of_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kernel", type=Kernel)
    flow = {"class_path": "samplers.ClippedFlowSDE", "init_args": {"max_std": 0.3}}
    reward = {"class_path": "tests.samplers.test_kernels_guided.Quadratic", "init_args": {"kappa": 3.0}}
    ascent = {"class_path": "samplers.RewardGradient", "init_args": {"reward": reward}}
    guided = {"class_path": "samplers.Guided", "init_args": {
        "kernel": {"class_path": "samplers.DPMSolver", "init_args": {"kernel": flow}}, "ascent": ascent, "start": 3,
    }}  # fmt: skip
    built = parser.instantiate_classes(parser.parse_object({"kernel": guided})).kernel
    assert isinstance(built, Guided) and isinstance(built.kernel, DPMSolver) and built.start == 3
    assert vars(built.kernel.kernel)["max_std"] == 0.3 and built.ascent == RewardGradient(Quadratic(3.0))
    linear = {"class_path": "samplers.LinearSDE", "init_args": {"sigma_max": 0.98}}
    assert parser.instantiate_classes(parser.parse_object({"kernel": linear})).kernel == LinearSDE(0.0, 0.98)


@dataclass(frozen=True)
class Broken:
    """Scores that cannot be used."""

    how: str

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return x.sum() if self.how == "shape" else (x - x).sqrt().sum(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guided(FlowSDE(), ASCENT, form="half"), "score_half"),
        (lambda: Guided(FlowSDE(), ASCENT, scale=-1.0), "got scale=-1.0"),
        (lambda: Guided(FlowSDE(), ASCENT, beta=0.0), "temperature"),
        (lambda: Guided(FlowSDE(), ASCENT, start=4, end=3), "start <= end"),
        (lambda: Guided(FlowSDE(), ASCENT, log_prob_mean="both"), "'unguided' or 'guided'"),
        (lambda: Guided(FlowSDE(), ASCENT, start=1)(X, V, 0.7, 0.5), "ctx.step"),
        (lambda: Guided(ODE(), ASCENT, form="full_tilt")(X, V, 1.0, 0.9), "set start=1"),
        (lambda: Guided(ODE(), ASCENT, form="full_tilt")(X, V, 0.99999, 0.9), "set start=1"),
        (
            lambda: Guided(FlowSDE(), RewardGradient(Broken("shape")))(X, V, 0.7, 0.5),
            r"got process rewards \[\] for 3 states",
        ),
        (lambda: Guided(FlowSDE(), RewardGradient(Broken("nan")))(X, V, 0.7, 0.5), r"not finite in rows \[0, 1, 2\]"),
        (lambda: spsa_gradient(lambda x: x.sum(1), X, X), r"\[M, n, \*\]"),
        (lambda: spsa_gradient(lambda x: x.sum(1) * torch.nan, X, X[None]), "not finite"),
        (lambda: spsa_gradient(lambda x: x.sum(1), X, X[None], tau=0.0), "tau=0.0"),
    ],
)
def test_bad_input_says_what_to_do(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
