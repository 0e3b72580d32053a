"""How much the draws of (σ, ε) add to the variance of a gradient: share both in a group or neither, and stratify σ.

The gradient by a shift of v, of groups of 8 samples of N(.7, .25) with z-scores of x0 as advantages, at exact velocities."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.advantage import Normalized
from flowalign.objectives import AdvantageWeighted, Predictions
from samplers import RectifiedFlow, SampleKeys, UniformSigma
from tests.helpers.gaussian_bed import F64, Gaussian, compared

DATA, MEMBERS, PROMPTS, DRAWS = Gaussian(0.7, 0.25), 8, 32, 64
GROUPS = PROMPTS * DRAWS  # each draw with samples of its own
LAW, PATH, GRID = UniformSigma(0.02, 1.0), RectifiedFlow(), torch.linspace(1, 0, 11)
KEYS = SampleKeys(0, 0, tuple((uid, 0, sample) for uid in range(PROMPTS) for sample in range(MEMBERS)))
# of the deviation s of x0 in a group: E s² and (E s)²
SQUARE = (MEMBERS - 1) / MEMBERS * DATA.variance
ROOT = 2 / MEMBERS * DATA.variance * (math.gamma(MEMBERS / 2) / math.gamma((MEMBERS - 1) / 2)) ** 2


def gradients(sigma: Tensor, noise: Tensor, seed: int = 0) -> Tensor:
    """[GROUPS] the gradient of each group's mean loss."""
    x0 = 0.7 + 0.5 * torch.randn(GROUPS * MEMBERS, generator=torch.Generator().manual_seed(seed), dtype=F64)
    signal = compared(Normalized(delta=0.0), x0.reshape(GROUPS, MEMBERS))
    slope, shift = DATA.line(sigma)
    live, target = slope * ((1 - sigma) * x0 + sigma * noise) + shift, noise - x0
    found = Predictions(live[:, None], {}, target[:, None], sigma)
    at = AdvantageWeighted().coefficients(found, signal, torch.ones(len(x0)))
    return (2 * at.c * (live - target)).reshape(GROUPS, MEMBERS).mean(1)


def drawn(shared_sigma: bool, shared_noise: bool) -> tuple[Tensor, Tensor]:
    """(σ, ε) [GROUPS · MEMBERS], members of a group side by side."""
    sigma = (KEYS.shared() if shared_sigma else KEYS).sigmas(LAW, DRAWS, GRID, PATH)
    noise = (KEYS.shared() if shared_noise else KEYS).noise((DRAWS,), 0)
    one, two = (each.double().reshape(PROMPTS, MEMBERS, DRAWS).transpose(1, 2).flatten() for each in (sigma, noise))
    return one, two


def moments(low: float, high: float) -> tuple[float, float, float]:
    """Means of a, a², b² for σ ~ U(low, high), where v − u = a·(x0 − m) + b·ε."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    sigma = torch.from_numpy((high + low) / 2 + (high - low) / 2 * nodes)
    a, b = sigma / DATA.spread(sigma), (1 - sigma) * DATA.variance / DATA.spread(sigma)
    first, second, third = (float(torch.from_numpy(weights / 2) @ each) for each in (a, a.square(), b.square()))
    return first, second, third


def exact(shared_sigma: bool, shared_noise: bool) -> float:
    """The std in closed form: ΣA = 0 cancels an ε that the group shares, and what else it has in common."""
    a, a2, b2 = moments(0.02, 1.0)
    if shared_sigma:
        return math.sqrt(4 * (a2 * SQUARE - a**2 * ROOT) + (0 if shared_noise else 4 * b2 / MEMBERS))
    fourth = 3 * (MEMBERS - 1) / (MEMBERS + 1)  # E A⁴
    inside = (a2 - a**2) * (DATA.variance + SQUARE * MEMBERS * fourth) + b2 * MEMBERS
    return math.sqrt(4 * a**2 * (SQUARE - ROOT) + 4 / MEMBERS**2 * inside)


SHARING = {(False, False): 0.5624, (True, False): 0.6369, (True, True): 0.4647}


@pytest.mark.parametrize("shared", SHARING, ids=["nothing shared", "sigma alone", "both"])
def test_sharing_both_is_best_and_sigma_alone_is_worst(shared: tuple[bool, bool]) -> None:
    assert exact(*shared) == pytest.approx(SHARING[shared], abs=2e-3)
    assert float(gradients(*drawn(*shared)).std()) == pytest.approx(exact(*shared), rel=4 / math.sqrt(2 * GROUPS))


def test_at_one_level_shared_noise_cancels_exactly() -> None:
    """σ = .6: 2(1.5·x0 − .25·ε) of each sample; independent ε adds 4·.0625/8 to the variance."""
    level = torch.full((GROUPS * MEMBERS,), 0.6, dtype=F64)
    _, own = drawn(False, False)
    _, shared = drawn(False, True)
    without = gradients(level, torch.zeros_like(own))
    torch.testing.assert_close(gradients(level, shared), without, atol=1e-6, rtol=0)
    one, two = 3 * math.sqrt(SQUARE - ROOT), math.sqrt(9 * (SQUARE - ROOT) + 4 * 0.0625 / 8)
    assert (one, two) == (pytest.approx(0.3675, abs=1e-3), pytest.approx(0.4075, abs=1e-3))
    assert float(without.std()) == pytest.approx(one, rel=4 / math.sqrt(2 * GROUPS))
    added = gradients(level, own) - without
    assert float(added.var()) == pytest.approx(0.03125, rel=4 * math.sqrt(2 / GROUPS))


def test_four_strata_divide_the_variance_of_the_levels_by_four() -> None:
    """Of a = σ/V(σ), the factor of x0: 4.17 for the mean of four draws on (0, 1), beyond the 4 of the draws themselves."""
    a, a2, _ = moments(0.0, 1.0)
    inside = np.mean([second - first**2 for first, second, _ in (moments(j / 4, (j + 1) / 4) for j in range(4))])
    factor = (a2 - a**2) / inside
    assert factor == pytest.approx(4.17, abs=0.03)
    many = replace(KEYS, rows=tuple((uid, 0, 0) for uid in range(1500)))
    variance = {}
    for strata in (False, True):
        sigma = many.sigmas(UniformSigma(strata=strata), 4, GRID, PATH).double()
        variance[strata] = float((sigma / DATA.spread(sigma)).mean(1).var())
    assert variance[False] / variance[True] == pytest.approx(factor, rel=4 * math.sqrt(4 / 1500))
