"""A clip range that names the latents it was found for is scaled to those at hand."""

import pytest
import torch

from flowalign.objectives import ClippedRatio, DynamicClip, Guard, Objective, Transitions
from flowalign.objectives.transitions import scale_of_clip_range
from samplers import FlowSDE
from samplers.kernels.gaussian import Reduce


def transitions(shape: tuple[int, ...], reduce: Reduce = "mean") -> Transitions:
    states = torch.zeros(2, *shape)
    step = FlowSDE(0.7, reduce=reduce)(states, states, 0.5, 0.4)
    return Transitions(step, states, step)


@pytest.mark.parametrize("objective", [ClippedRatio(1e-3, elements=64), Guard(1e-3, elements=64)])
def test_the_limit_follows_the_spread_of_a_log_ratio(objective: Objective) -> None:
    """16 elements: twice the clip range of 64; 256: half of it. Summed log-probs spread the other way."""
    for shape, reduce, expected in [
        ((4, 2, 2), "mean", 2e-3), ((64,), "mean", 1e-3), ((16, 4, 4), "mean", 5e-4), ((16, 4, 4), "sum", 2e-3),
    ]:  # fmt: skip
        here = transitions(shape, reduce)
        torch.testing.assert_close(objective.drift_limit(here), torch.full((2,), expected).double())


def test_a_ratio_is_clipped_at_the_scaled_range() -> None:
    """e^{0.0015} is outside 1 ± 1e-3 and inside 1 ± 2e-3."""
    log_prob, old, advantages = torch.full((2,), 1.5e-3), torch.zeros(2), torch.ones(2, 1)
    here = transitions((4, 2, 2))
    for objective, outside in ((ClippedRatio(1e-3), True), (ClippedRatio(1e-3, elements=64), False)):
        assert objective.clipped(log_prob, old, advantages, here).tolist() == [outside, outside]
        bound = 1e-3 if outside else 1.5e-3
        torch.testing.assert_close(
            objective.loss(log_prob, old, advantages, here), -torch.full((2,), 1 + bound), atol=2e-6, rtol=0
        )


def test_a_scaled_clip_range_needs_the_latents() -> None:
    with pytest.raises(ValueError, match="pass Transitions"):
        ClippedRatio(elements=64).loss(torch.zeros(1), torch.zeros(1), torch.ones(1, 1))
    for part in (lambda: ClippedRatio(elements=0), lambda: Guard(elements=0), lambda: DynamicClip(elements=0)):
        with pytest.raises(ValueError, match="elements=0; expected at least 1"):
            part()
    assert scale_of_clip_range(None, torch.zeros(1, 5), "mean") == 1
