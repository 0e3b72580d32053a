"""Anchors in the common unit κ/(c·w): published coefficients of different methods that are one number."""

from dataclasses import replace

import pytest
import torch

from flowalign.diagnostics.doctor.objective import check_anchors
from flowalign.objectives import (
    NFT,
    AdvantageWeighted,
    CenteredReward,
    ClippedRatio,
    FlatGradient,
    GroupPreference,
    Guard,
    InverseLength,
    KLMask,
    KLPenalty,
    NormGuard,
    Objective,
    Predictions,
    StateObjective,
    StepWeight,
    Uniform,
    VelocityAnchor,
)
from flowalign.trainers import Pulls
from flowalign.trainers.pulls import pulls_of_draws, pulls_of_edges
from samplers import CPS, FlowSDE, Forest, Kernel, chain
from tests.helpers.trees import grown

SIGMA = torch.tensor([0.1, 0.3, 0.6, 0.95])


def predictions(seed: int = 0) -> Predictions:
    """An unchanged policy at n draws: all roles have one velocity."""
    live, target = torch.randn(2, len(SIGMA), 5, generator=torch.Generator().manual_seed(seed))
    return Predictions(live, dict.fromkeys(("reference", "old", "ema", "fast"), live), target, SIGMA)


def ratio(objective: StateObjective, anchor: VelocityAnchor) -> torch.Tensor:
    return pulls_of_draws(objective, {"kl": anchor}, SIGMA, predictions()).ratio("kl")


def test_rams_multiplier_of_100_is_awms_kl_of_a_hundredth() -> None:
    """RAM 2605.10759 in both forms, AWM 2509.25050."""
    for residual in ("old", "live"):
        ram = AdvantageWeighted(scale=100.0, residual=residual)
        torch.testing.assert_close(ratio(ram, VelocityAnchor(1.0)), torch.full((4,), 0.01).double())
    torch.testing.assert_close(
        ratio(AdvantageWeighted(), VelocityAnchor(0.01)), torch.full((4,), 0.01).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nfts_kl_of_1e_4_is_a_multiplier_of_10_000_times_sigma_squared(beta: float) -> None:
    """Without its adaptive weight; whatever its β is, and its clip as long as an advantage of 1 is inside."""
    for clip in (5.0, 2.0):
        found = ratio(NFT(beta=beta, adaptive=False, advantage_clip=clip), VelocityAnchor(1e-4))
        torch.testing.assert_close(1 / found, 1e4 * SIGMA.double().square(), rtol=1e-5, atol=0)


def test_the_adaptive_weight_is_that_of_the_errors_at_hand() -> None:
    found = predictions()
    gap = (found.live - found.target).abs().flatten(1).mean(1).double()
    c = SIGMA.double() / gap
    torch.testing.assert_close(ratio(AdvantageWeighted(weight="adaptive"), VelocityAnchor(0.5)), 0.5 / c, rtol=1e-5, atol=0)  # fmt: skip
    torch.testing.assert_close(ratio(NFT(), VelocityAnchor(0.5)), 0.5 / c, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("objective", "c"),
    [(GroupPreference(), 0.5), (GroupPreference(guard="fast", clip=0.01), 0.5), (CenteredReward(weight="velocity"), 1.0)],
)  # fmt: skip
def test_objectives_that_compare_a_group_have_a_signal_too(objective: StateObjective, c: float) -> None:
    """DGPO's gate is half open; CRD regresses half the difference of the good shares of +1 and −1, times 10."""
    torch.testing.assert_close(ratio(objective, VelocityAnchor(0.02)), torch.full((4,), 0.02 / c).double(), rtol=1e-6, atol=0)  # fmt: skip


def test_an_anchor_of_clean_samples_is_beside_a_loss_of_clean_samples() -> None:
    anchor = VelocityAnchor(0.3, space="x0")
    torch.testing.assert_close(ratio(AdvantageWeighted(weight="x0"), anchor), torch.full((4,), 0.3).double(), rtol=1e-6, atol=0)  # fmt: skip


# ------------------------------------------------------------------------------------------ of steps


def forest_of(kernel: Kernel) -> Forest:
    forest = grown(chain(6, 2), kernel, width=7)
    return replace(forest, states=forest.states.double())


def coefficients(forest: Forest, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """b², 2ς² and h of the steps that leave these levels."""
    grid = forest.sigmas.double()
    index = torch.tensor([int((grid - level).abs().argmin()) for level in sigma])
    affine = forest.kernel.coefficients(grid[index], grid[index + 1], 1.0, index)
    return {
        "b2": affine.velocity_coef.square(),
        "s2": 2 * affine.std.square(),
        "h": grid[index] - grid[index + 1],
        "flat": affine.std / affine.velocity_coef.abs(),
    }


def edges(
    kernel: Kernel, form: str, objective: Objective | None = None, weight: StepWeight | None = None
) -> tuple[Pulls, dict[str, torch.Tensor]]:
    forest = forest_of(kernel)
    terms = {"kl": KLPenalty(0.04, form), "guard": NormGuard(0.1)}  # type: ignore[arg-type]
    found = pulls_of_edges(forest, objective or ClippedRatio(), weight or Uniform(), terms)
    return found, coefficients(forest, found.sigma)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_forms_of_a_kl(reduce: str) -> None:
    """Beside log-probs with full constants: c·w = b²/(2ς²)."""
    kernel = FlowSDE(0.7, reduce=reduce)  # type: ignore[arg-type]
    elements = 7 if reduce == "sum" else 1
    for form in ("exact", "exact_times_h", "velocity", "mean_sq"):
        found, at = edges(kernel, form)
        w = at["b2"] / at["s2"]
        expected = {"exact": w, "exact_times_h": w * at["h"], "velocity": 1 + 0 * w, "mean_sq": at["b2"]}[form]
        torch.testing.assert_close(found.signal, elements * w, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.kappa["kl"], 0.04 * elements * expected, rtol=1e-4, atol=0)


def test_a_log_prob_without_constants_is_a_weaker_signal() -> None:
    found, at = edges(CPS(0.7), "exact")
    torch.testing.assert_close(found.signal, at["b2"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.ratio("kl"), 0.04 / at["s2"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("objective", "weight", "name"),
    [
        (ClippedRatio(), FlatGradient(), "flat"),
        (KLMask(), Uniform(), "one"),
        (Guard(weight="none"), Uniform(), "std"),
        (Guard(weight="inv_h"), Uniform(), "std/h"),
        (ClippedRatio(), InverseLength(), "1/h"),
    ],
)
def test_weights_of_steps_and_other_objectives(objective: Objective, weight: StepWeight, name: str) -> None:
    """Guard's ratio is without the bias of the log-ratio and a factor s of it: the gradient is s times as strong."""
    found, at = edges(FlowSDE(0.7), "exact", objective, weight)
    std = (at["s2"] / 2).sqrt()
    factor = {"flat": at["flat"], "one": 1 + 0 * std, "std": std, "std/h": std / at["h"], "1/h": 1 / at["h"]}[name]
    torch.testing.assert_close(found.ratio("kl"), 0.04 / factor, rtol=1e-4, atol=0)


def test_the_line_of_the_doctor() -> None:
    found, _ = edges(FlowSDE(0.7), "exact")
    assert bool((found.kappa["guard"] == 0).all())
    finding = check_anchors(lambda batch: found, lambda: None)
    assert finding.ok and not finding.advice
    first, second = finding.figure.split("; ")
    assert first.startswith("kl → reference κ/(c·w) = 0.04 at advantage 1, σ 1.00 to ")
    assert second == "guard → reference 0 (it acts beyond a threshold only)"
    assert check_anchors(lambda batch: Pulls(SIGMA, SIGMA, {}, {}), lambda: None).figure.startswith("none")
    assert "weighs no anchor" in check_anchors(None, lambda: None).figure
