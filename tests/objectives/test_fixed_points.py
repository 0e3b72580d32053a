"""Where each objective of states stops, at one state of exact Gaussian data: which of them reach the tilt p·e^R/Z.

Numbers are those of closed forms worked out apart from this code; R is centered over the reference, whose law the samples have
unless a test says otherwise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.advantage import Exponential
from flowalign.objectives import (
    NFT,
    AdvantageWeighted,
    CenteredReward,
    Coefficients,
    GroupPreference,
    Predictions,
    StateObjective,
    VelocityAnchor,
)
from tests.helpers.draws import Drawn, Net
from tests.helpers.gaussian_bed import F64, AtState, Gaussian, Reward, compared, root, shift_gradient

REF, CONCAVE, LINEAR = Gaussian(0.7, 0.25), Reward(3.0, 2.0), Reward(0.8)
TILT = REF.tilted(CONCAVE)
TO_OLD, TO_REF = VelocityAnchor(1.0, "old"), VelocityAnchor(1.0)
LAGGED = AdvantageWeighted(residual="old", old="old")
# (σ, x): reference, exact tilt, one explicit step, Cov at the reference, the reference and Cov at the tilt
POINTS = {
    (0.6, 1.0): (0.2, -0.120690, -0.265, -0.465, -0.021165),
    (0.6, 0.2): (-0.8, -1.224138, -1.415, -0.615, -1.092509),
    (0.3, 1.0): (-0.4, -0.621359, -0.668235, -0.268235, -0.582675),
    (0.9, 1.0): (0.301538, 0.016427, -0.125690, -0.427228, 0.111269),
}


def at(sigma: float, x: float, data: Gaussian = REF, nodes: int = 24) -> AtState:
    return AtState(data, x, sigma, {"old": data.velocity(x, sigma), "reference": REF.velocity(x, sigma)}, nodes)


def near(value: float, tolerance: float = 1e-6) -> object:
    return pytest.approx(value, abs=tolerance)


# ------------------------------------------------------------------------------------ the tilt by e^R, and one-step fields


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_velocities_of_the_reference_and_of_its_tilt(point: tuple[float, float]) -> None:
    sigma, x = point
    reference, exact, *_ = POINTS[point]
    assert (TILT.mean, TILT.variance) == (near(0.966667), near(0.166667))
    assert REF.velocity(x, sigma) == near(reference)
    assert TILT.velocity(x, sigma) == near(exact)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_these_reach_the_exponential_tilt(point: tuple[float, float]) -> None:
    """Implicit tilt matching and regression on e^{ηR}-weighted samples, however Z is estimated and whatever R is centered at."""
    draws = at(*point)
    for shift in (0.0, 5.0):
        scores = CONCAVE(draws.samples)[None] + shift
        implicit = compared(Exponential(1.0), scores)
        assert draws.stop(AdvantageWeighted(), implicit, TO_OLD) == near(POINTS[point][1])
        off_by_two = 2 * (implicit + 1) - 1  # a Z that is half of the true one
        assert draws.stop(AdvantageWeighted(), off_by_two, TO_OLD) == near(POINTS[point][1])
        assert draws.stop(AdvantageWeighted(), compared(Exponential(1.0, 0.0), scores)) == near(POINTS[point][1])


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_explicit_tilt_matching_and_nft_and_the_first_step_of_ram_stop_at_their_own_field(
    point: tuple[float, float],
) -> None:
    """v_old + E[R(u − v_old)|x], which is not the tilt: the error of one Euler step in the amount of tilt."""
    sigma, x = point
    reference, exact, explicit, covariance, _ = POINTS[point]
    draws = at(sigma, x)
    signal = REF.centered(CONCAVE, draws.samples)
    found = {
        "explicit tilt matching": draws.stop(LAGGED, signal, TO_OLD),
        "NFT": draws.stop(NFT(beta=0.01, adaptive=False), 0.05 * signal),  # (2p − 1)/β = R, far from p's clip
        "RAM": draws.stop(LAGGED, signal, TO_REF),
    }
    for value in found.values():
        assert value == near(explicit) and value - reference == near(covariance)
    assert abs(explicit - exact) > 0.02


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_tilt_is_no_fixed_point_of_ram(point: tuple[float, float]) -> None:
    """On samples of the tilt itself RAM stops short of the tilt; the integral of Cov over the amount of tilt leads there."""
    sigma, x = point
    reference, exact, *_, behind = POINTS[point]
    draws = at(sigma, x, TILT)
    assert draws.stop(LAGGED, REF.centered(CONCAVE, draws.samples), TO_REF) == near(behind)
    amounts, weights = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for amount, weight in zip((amounts + 1) / 2, weights / 2, strict=True):
        here = at(sigma, x, REF.tilted(CONCAVE, float(amount)))
        signal = REF.centered(CONCAVE, here.samples)
        total += weight * (here.stop(LAGGED, signal, TO_OLD) - here.roles["old"])
    assert total == near(exact - reference)
    if point == (0.6, 1.0):
        assert total == near(-0.320690)


def test_code_form_ram_reaches_the_exponential_tilt_only_where_the_reward_is_linear() -> None:
    """There its field is the shift −sτ²σ/V of the tilt, at every state; the linear tilt p(1 + R) is another law even so."""
    for (sigma, x), shift in {(0.9, 1.0): -0.221538, (0.6, 1.0): -0.3, (0.6, 0.2): -0.3, (0.3, 1.0): -0.282353}.items():
        draws = at(sigma, x)
        signal = REF.centered(LINEAR, draws.samples)
        own = draws.stop(LAGGED, signal, TO_REF)
        assert own - REF.velocity(x, sigma) == near(shift)
        assert own == near(REF.tilted(LINEAR).velocity(x, sigma))
        assert abs(draws.stop(AdvantageWeighted(), signal, TO_REF) - own) > 1e-3


def test_nft_by_its_own_share_of_good() -> None:
    """p = ½ + .1R and β = 1: a fifth of the explicit step. The adaptive weight moves the stop."""
    draws = at(0.6, 1.0)
    signal = REF.centered(CONCAVE, draws.samples)
    assert draws.stop(NFT(1.0, adaptive=False), signal) == near(0.107, 5e-5)  # p is clipped at the last nodes
    slope, curvature = draws.gradient(NFT(1.0, adaptive=True), signal, (), 0.107)
    assert curvature > 0 and abs(slope) > 0.1


@pytest.mark.parametrize("x", [-0.4, 0.7, 1.5])
def test_nft_on_a_linear_share_shifts_the_velocity_by_a_constant(x: float) -> None:
    """p = ½ + c(x0 − m): −(2c/β)·τ²σ/V at every x."""
    draws = at(0.6, x, nodes=8)
    advantage = 10 * 0.2 * (draws.samples - REF.mean)
    assert draws.stop(NFT(0.5, adaptive=False), advantage) - draws.roles["old"] == near(-0.3)


def test_the_crisp_case() -> None:
    """N(0, 1), R = −x²/2, σ = ½, x = 1."""
    data, reward = Gaussian(0, 1), Reward(0.0, 1.0)
    tilted = data.tilted(reward)
    draws = AtState(data, 1.0, 0.5, {"old": 0.0, "reference": 0.0})
    assert data.velocity(1.0, 0.5) == near(0) and tilted.velocity(1.0, 0.5) == near(2 / 3)
    scores = reward(draws.samples)
    assert draws.stop(AdvantageWeighted(), compared(Exponential(), scores[None]), TO_OLD) == near(2 / 3)
    assert draws.stop(LAGGED, scores, TO_OLD) == near(1)
    behind = AtState(tilted, 1.0, 0.5, {"old": tilted.velocity(1.0, 0.5), "reference": 0.0})
    assert draws.stop(AdvantageWeighted(), torch.zeros(24), TO_REF) == near(0)  # all equally good
    assert behind.stop(LAGGED, reward(behind.samples), TO_REF) == near(4 / 9)


# ------------------------------------------------------------------------------------ the linear tilt


def linear(sigma: float) -> dict[str, tuple[StateObjective, float, VelocityAnchor]]:
    """Name: (objective, scale of the advantage, anchor), all with the same ratio of the anchor to the pull."""
    elbo = (1 - sigma) / (sigma + 1e-3)
    return {
        "AWM": (AdvantageWeighted(), 1.0, TO_REF),
        "AWM, sigma": (AdvantageWeighted(weight="sigma"), 1.0, VelocityAnchor(sigma)),
        "AWM, clip": (AdvantageWeighted(ratio="epg", clip=1.0), 1.0, TO_REF),
        "ELBO-PG": (AdvantageWeighted(ratio="epg"), 1.0, TO_REF),
        "ELBO-PG, x0": (AdvantageWeighted(weight="x0", ratio="epg"), 1.0, VelocityAnchor(sigma**2)),
        "ELBO-PG, elbo": (AdvantageWeighted(weight="elbo", ratio="epg"), 1.0, VelocityAnchor(elbo)),
        "V-GRPO": (AdvantageWeighted(weight="x0"), 1.0, VelocityAnchor(1.0, "old", "x0")),
        "live RAM": (AdvantageWeighted(100.0), 0.01, TO_REF),
        "live RAM, multiplier as an anchor": (AdvantageWeighted(), 0.01, VelocityAnchor(0.01)),
    }


@pytest.mark.parametrize("name", linear(0.6))
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_awm_and_elbo_pg_and_v_grpo_and_live_ram_stop_at_the_linear_tilt(point: tuple[float, float], name: str) -> None:
    """The velocity of p(1 + R), v_ref + Cov(R, u|x)/(1 + E[R|x]), with weights of σ alone and the ratio at 1."""
    sigma, x = point
    objective, scale, anchor = linear(sigma)[name]
    reference, exact, _, covariance, _ = POINTS[point]
    draws = at(sigma, x)
    signal = REF.centered(CONCAVE, draws.samples)
    mean = float(draws.data.posterior(x, sigma).nodes()[1] @ signal)
    found = draws.stop(objective, scale * signal, anchor)
    assert found == near(reference + covariance / (1 + mean))
    assert abs(found - exact) > 0.03
    if point == (0.6, 1.0):
        assert (found, mean) == (near(-0.163111), near(0.2806))


def test_the_linear_tilt_has_a_minimum_only_where_the_mean_curvature_is_positive() -> None:
    """1 + E[R|x], at σ = .6 for x inside (−1.681, 8.641)."""

    def curvature(x: float) -> float:
        draws = at(0.6, x)
        return draws.gradient(AdvantageWeighted(), REF.centered(CONCAVE, draws.samples), [TO_REF], 0.0)[1]

    assert root(curvature, -2.0, -1.9) == near(-1.681, 5e-4) and root(curvature, 8.0, 8.1) == near(8.641, 5e-4)
    assert curvature(-1.7) < 0 < curvature(-1.6) and curvature(8.6) > 0 > curvature(8.7)


def test_awm_with_a_lagging_average_as_its_anchor() -> None:
    """v_ema + E[A(u − v_ema)|x]/(E[A|x] + κ)."""
    draws, ema, kappa = at(0.6, 1.0), -0.35, 1.2
    draws = AtState(REF, 1.0, 0.6, {**draws.roles, "ema": ema})
    signal = REF.centered(CONCAVE, draws.samples)
    covariance = -0.465 + 0.2806 * (0.2 - ema)  # E[A(u − v_ema)] = Cov + E[A](v_ref − v_ema)
    found = draws.stop(AdvantageWeighted(ratio="epg"), signal, VelocityAnchor(kappa, "ema"))
    assert found == near(ema + covariance / (0.2806 + kappa))


# ------------------------------------------------------------------------------------ regressions of one bound on the reward


@dataclass(frozen=True)
class WithoutRatio:
    """c = A − Δ, that of "pepg" over the ratio and weight that "epg" says it has."""

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        pepg, epg = (AdvantageWeighted(weight="x0", ratio=kind, old="old") for kind in ("pepg", "epg"))
        ratio = epg.coefficients(found, torch.ones_like(advantage), coupling).c
        return Coefficients(pepg.coefficients(found, advantage, coupling).c / ratio)


@pytest.mark.parametrize(("weight", "shift", "stop"), [(1.0, 0.33185, -0.35309), (1 / 0.45, 0.20329, -0.13881)])
def test_par_without_its_ratio_solves_a_cubic_and_is_off_the_tilt_even_with_the_right_weight(
    weight: float, shift: float, stop: float
) -> None:
    """w·d³ + (2w·Var + E[A|x])d + E[A·e|x] = 0 in the shift d of x̂0; 1/(2Var) is the weight that a density would have."""
    draws = at(0.6, 1.0)
    signal = REF.centered(CONCAVE, draws.samples)
    found = draws.stop(WithoutRatio(), signal / weight)  # w of the bound is 1/w of the reward
    roots = np.roots([weight, 0, 2 * weight * 0.225 + 0.2806, 0.6 * -0.465])
    (gap,) = roots[abs(roots.imag) < 1e-12].real
    assert 0.6 * (0.2 - found) == near(gap) and gap == near(shift, 1e-5) and found == near(stop, 1e-5)
    assert abs(found - POINTS[0.6, 1.0][1]) > 0.015


def test_pepg_with_its_ratio_stops_elsewhere() -> None:
    """ρ = exp(−(2e·d + d²)) moves the mean of e = x̂0 − x0 to −2d·Var, under which E[(A + 2e·d + d²)(e + d)] = 0."""
    draws = at(0.6, 1.0)
    before = 1 - 0.6 * 0.2  # x̂0
    variance = REF.posterior(1.0, 0.6).variance
    constant, slope = float(REF.centered(CONCAVE, torch.tensor(before, dtype=F64))), 2 * before - 3  # A = R(x̂0 − e)

    def moment(d: float) -> float:
        mean = -2 * d * variance
        second, third = mean**2 + variance, mean**3 + 3 * mean * variance
        a, b, c = constant + d**2, slope + 2 * d, -1.0
        return a * (mean + d) + b * (second + d * mean) + c * (third + d * second)

    found = draws.stop(AdvantageWeighted(weight="x0", ratio="pepg", old="old"), REF.centered(CONCAVE, draws.samples))
    assert 0.6 * (0.2 - found) == near(root(moment, 0.2, 0.3))
    assert abs(found + 0.35309) > 0.01


def shift_stop(
    objective: StateObjective,
    sigma: float,
    outcomes: Callable[[Tensor], list[tuple[Tensor, Tensor]]],
    shared: bool,
    nodes: int,
) -> float:
    """θ of v = v_ref + θ at which a group of two stops."""
    return root(shift_gradient(objective, REF, sigma, outcomes, shared, nodes), 0.0, -0.1)


def crd(x0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A = R: p = ½ + .1R, where no node is clipped."""
    return [(0.8 * (x0 - REF.mean), torch.ones(len(x0), dtype=F64))]


def preferred(x0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The first member wins, by Bradley-Terry of r = .8x; by symmetry the second one adds as much."""
    return [(torch.tensor([1.0, -1.0], dtype=F64).expand_as(x0), (0.8 * (x0[:, 0] - x0[:, 1])).sigmoid())]


@pytest.mark.parametrize(
    ("sigma", "tilt", "shared", "independent", "pair"),
    [
        (0.9, -0.221538, -0.361111, -0.36, -0.722222),
        (0.6, -0.3, -0.266667, -0.24, -0.533333),
        (0.3, -0.282353, -0.283333, -0.12, -0.566667),
    ],
)
def test_the_temperature_of_crd_and_dpo_depends_on_sigma_and_on_sharing_noise(
    sigma: float, tilt: float, shared: float, independent: float, pair: float
) -> None:
    """Shifts of v under a linear reward. Shared: −sV/(2σ); independent: errors in the variable shrink it to −sσ/2; a pair
    −sV/(βσ). A weight of the bound, here a beta, makes one σ right: V²/(2τ²σ²), V/(2τ²), and for a pair V/Var(x0|x)."""
    spread, variance = REF.spread(sigma), REF.posterior(0.0, sigma).variance

    def bounds(weight: float, shared: bool) -> float:
        return shift_stop(CenteredReward(0.1 * weight, "velocity"), sigma, crd, shared, 3)

    assert bounds(1.0, True) == near(shared) and bounds(1.0, False) == near(independent)
    assert bounds(spread / (2 * variance), True) == near(tilt)
    assert bounds(spread / (2 * REF.variance), False) == near(tilt)
    assert shift_stop(GroupPreference(1.0), sigma, preferred, True, 3) == near(pair)
    assert shift_stop(GroupPreference(spread / variance), sigma, preferred, True, 3) == near(tilt)


@pytest.mark.parametrize(("sigma", "stop"), [(0.9, -0.7199), (0.6, -0.4764), (0.3, -0.2302)])
def test_a_pair_with_independent_noise_is_shrunk_too(sigma: float, stop: float) -> None:
    assert shift_stop(GroupPreference(1.0), sigma, preferred, False, 4) == near(stop, 0.002)


# ------------------------------------------------------------------------------------ those that stop nowhere


def better(x0: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The higher of the two, without doubt."""
    return [((x0 - x0.mean(1, keepdim=True)).sign(), torch.ones(len(x0), dtype=F64))]


def test_dgpo_and_dpo_on_certain_preferences_stop_nowhere_but_their_gate_closes() -> None:
    gradient = shift_gradient(GroupPreference(20.0), REF, 0.6, better, True, 5)
    slopes = [gradient(theta) for theta in (0.0, -1.0, -2.0, -4.0, -8.0)]
    assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)
    assert slopes[1] < 0.1 * slopes[0] and slopes[-1] < 1e-12 * slopes[0]


def test_rvm_without_an_anchor_has_no_minimum_where_samples_are_bad() -> None:
    """K = E[A|x], whose mean over x is 0: away from the good side the loss falls without bound."""
    x = 0.4 * REF.mean + REF.spread(0.6) ** 0.5 * Gaussian(0, 1).nodes(10)[0]
    weights = Gaussian(0, 1).nodes(10)[1]
    curvatures = []
    for each in x.tolist():
        draws = at(0.6, each)
        curvatures.append(draws.gradient(AdvantageWeighted(), REF.centered(CONCAVE, draws.samples), (), 0.0)[1])
    found = torch.tensor(curvatures, dtype=F64)
    assert float(weights @ found) == near(0, 1e-9)
    assert 0.2 < float(weights @ (found < 0).double()) < 0.8


# ------------------------------------------------------------------------------------ first directions


OLD = Net(1)


def first(objective: StateObjective, drawn: Drawn) -> Tensor:
    """The gradient at unchanged weights."""
    return drawn.common_form(objective, OLD, {"old": OLD, "reference": OLD})


@pytest.mark.parametrize(
    ("one", "other", "factor"),
    [
        (AdvantageWeighted(weight="x0", ratio="epg", old="old"), NFT(1.0, adaptive=False), 1.0),
        (AdvantageWeighted(weight="adaptive", ratio="epg", old="old"), NFT(0.1), 1.0),
        (AdvantageWeighted(ratio="epg"), CenteredReward(1.0, "velocity"), 1.0),
        (AdvantageWeighted(), GroupPreference(1.7), 0.5),
        (AdvantageWeighted(), AdvantageWeighted(ratio="pepg"), 1.0),
    ],
    ids=["AWM and NFT", "adaptive AWM and NFT", "AWM and CRD", "AWM and DGPO", "AWM and PEPG"],
)
def test_at_unchanged_weights_these_take_the_same_first_step(
    one: StateObjective, other: StateObjective, factor: float
) -> None:
    drawn = Drawn(shared=False)
    torch.testing.assert_close(first(other, drawn), factor * first(one, drawn))


def test_awm_of_plain_errors_is_not_parallel_to_nft_over_several_levels() -> None:
    drawn = Drawn(shared=False)
    one, other = first(AdvantageWeighted(), drawn), first(NFT(adaptive=False), drawn)
    assert float(torch.cosine_similarity(one, other, 0)) < 0.99


def test_the_loss_of_a_pair_begins_at_ln_2_with_half_of_its_gradient() -> None:
    """z = 0 at the reference, whatever is added to the errors of both."""
    drawn = Drawn()
    objective, same = GroupPreference(100.0), drawn.velocity(OLD).detach()
    found = Predictions(same, {"reference": same}, drawn.u, drawn.sigma)
    coupling = objective.couple(objective.value(found), drawn.ids)
    assert torch.equal(coupling, torch.full((16,), 0.5, dtype=F64))
    assert -math.log(1 - float(coupling[0])) == pytest.approx(math.log(2))
    torch.testing.assert_close(objective.coefficients(found, drawn.ids.advantage, coupling).c, drawn.ids.advantage / 2)
    values = torch.linspace(-0.02, 0.03, 16, dtype=F64)
    torch.testing.assert_close(objective.couple(values + 7.0, drawn.ids), objective.couple(values, drawn.ids))
