"""Weights of samples: what law of samples they make, and how far a group of G is from the whole of it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.advantage import Advantages, Best, Exponential, Normalized, SignalContext, SoftClipped
from flowalign.credit import EdgeValues
from samplers import Forest
from tests.helpers.gaussian_bed import F64, compared


def normals(groups: int, members: int) -> Tensor:
    """[groups, members] standard normals of a Sobol sequence: sums of smooth functions converge nearly as 1/groups."""
    uniform = torch.quasirandom.SobolEngine(members, scramble=True, seed=3).draw(groups).double()
    return torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))


# std of η·R: the tilted mean by groups of 8 and of 24, and exactly. x0 ~ N(.7, .25), R = slope·x0
UNDER = {0.4: (0.8714, 0.8903, 0.9), 1.0: (1.0838, 1.1531, 1.2), 2.0: (1.2703, 1.4378, 1.7)}


@pytest.mark.parametrize("std", UNDER)
@pytest.mark.parametrize("members", [8, 24])
def test_z_estimated_in_the_group_under_tilts(std: float, members: int) -> None:
    groups = 1024
    x = 0.7 + 0.5 * normals(groups, members)
    weight = compared(Exponential(2 * std), x).reshape(x.shape) + 1
    torch.testing.assert_close(weight.mean(1), torch.ones(groups, dtype=F64), atol=1e-6, rtol=0)
    tilted, (*in_group, exact) = float((weight * x).mean()), UNDER[std]
    assert tilted == pytest.approx(in_group[members == 24], abs=3e-3) and tilted < exact - 6e-3
    assert in_group[members == 24] == pytest.approx(self_normalized(std, members), abs=6e-5)


def self_normalized(std: float, members: int) -> float:
    """E[Σ x·e^R/Σ e^R] = G·∫ E[x·e^R·e^{−t·e^R}]·E[e^{−t·e^R}]^{G−1} dt, over log t."""
    z = np.linspace(-9, 9, 401)
    density = np.exp(-(z**2) / 2) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    share, t = np.exp(std * z), np.exp(np.linspace(-30, 20, 801))
    kept = np.exp(-t[:, None] * share)
    one = (kept * (0.7 + 0.5 * z) * share) @ density
    rest = kept @ density
    return float(members * np.trapezoid(one * rest ** (members - 1) * t, np.log(t)))


def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing() -> None:
    scores = normals(3, 5)
    shifted = scores + torch.tensor([[0.0], [300.0], [-2000.0]])
    torch.testing.assert_close(
        compared(Exponential(3.0), shifted), compared(Exponential(3.0), scores), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(compared(Exponential(3.0), torch.full((2, 4), 7.0)), torch.zeros(8, dtype=F64))
    assert torch.equal(compared(Exponential(3.0, 0.0), torch.full((2, 4), 7.0)), torch.zeros(8, dtype=F64))
    for offset in (0.0, -1.0):
        values = compared(Exponential(3.0, offset), scores)
        assert bool((values >= offset).all())


@pytest.mark.parametrize(("members", "factor"), [(2, 0.5), (4, 0.75), (24, 0.958333)])
def test_a_mean_that_includes_the_sample_scales_the_signal_by_one_less_one_over_g(members: int, factor: float) -> None:
    """Over all others of a group, by linearity: all of them at their mean."""
    scores = torch.full((1, members), 0.3, dtype=F64)
    scores[0, 0] = 1.7
    found = compared(Normalized(std="none"), scores)
    assert float(found[0]) == pytest.approx(factor * 1.4, abs=1e-6)


@dataclass(frozen=True)
class Plain:
    """The score itself."""

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        return Advantages(credit.values.float(), credit.valid, 0.0)


def test_soft_clip() -> None:
    scores = torch.tensor([[1.0, 3.0, 5.0, -5.0], [9.0, 0.0, 0.0, 0.0]])
    found = compared(SoftClipped(Plain(), 3.0), scores)
    expected = torch.tensor([0.964538, 2.284782, 2.793329, -2.793329], dtype=F64)
    torch.testing.assert_close(found[:4], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        compared(SoftClipped(Plain(), 1e6), scores), scores.flatten().double(), atol=1e-4, rtol=0
    )
    assert abs(float(found[4:].sum())) > 1  # of a skewed group the sum is no longer 0 …
    recentered = compared(SoftClipped(Normalized(), 3.0, recenter=True), scores).reshape(2, 4)
    torch.testing.assert_close(recentered.sum(1), torch.zeros(2, dtype=F64), atol=1e-6, rtol=0)  # … without this


# ------------------------------------------------------------------------------------ the best of K


MOMENTS = {2: (0.5642, 0.6817), 4: (1.0294, 0.4917), 8: (1.4236, 0.3729), 16: (1.7660, 0.2950), 24: (1.9477, 0.2615)}


@pytest.mark.parametrize("count", MOMENTS)
def test_the_best_of_k_have_the_moments_of_an_order_statistic(count: int) -> None:
    x = normals(256, count)
    chosen = torch.cat([compared(Best(), part) for part in x.split(32)]).reshape(x.shape) == 1
    assert torch.equal(chosen.sum(1), torch.ones(256, dtype=torch.int64))
    best = x[chosen]
    mean, variance = MOMENTS[count]
    assert float(best.mean()) == pytest.approx(mean, abs=0.02)
    assert float(best.var(correction=0)) == pytest.approx(variance, abs=0.03)
    z = torch.linspace(-9, 9, 6001, dtype=F64)
    density = count * torch.special.ndtr(z) ** (count - 1) * (-(z**2) / 2).exp() * 0.003 / (2 * torch.pi) ** 0.5
    exact = float(density @ z)
    assert exact == pytest.approx(mean, abs=6e-5) and float(density @ (z - exact) ** 2) == pytest.approx(
        variance, abs=6e-5
    )


def test_a_group_without_a_winner_and_ties() -> None:
    flat, tied = torch.full((1, 4), 0.5), torch.tensor([[0.2, 0.9, 0.9, 0.1]])
    assert float(compared(Best(), flat).abs().sum()) == 0
    assert compared(Best(), tied).tolist() == [0, 1, 0, 0]
    assert compared(Best(ties="all"), tied).tolist() == [0, 1, 1, 0]
    assert float(compared(Best(min_gap=0.5), tied).abs().sum()) == 0
    several = torch.tensor([[0.1, 0.7], [0.9, 0.8]])
    assert compared(Best(2, within="batch"), several).tolist() == [0, 0, 1, 1]
