"""The gradient of a reward in the start noise: through the steps of the rollout, the decoder and `score`, to the latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.data import as_records
from flowalign.models import load_policy
from rewards import RewardBatch, RewardOutput, RewardSpec, score
from samplers import ODE, unroll
from tests.helpers.plain_rewards import Plain

PROMPTS = ['the word "KITE" in red on a yellow background', 'the word "MOON"']
STEPS, SHAPE = 3, (len(PROMPTS), 3, 24, 48)
GENERATOR = torch.Generator().manual_seed(0)
START, WEIGHT, *DIRECTIONS = (torch.randn(SHAPE, generator=GENERATOR) for _ in range(4))


def colored(batch: RewardBatch) -> RewardOutput:
    """A cubic of every pixel with a weight of its own, summed in float64: its slope differs everywhere."""
    images = batch.images.double()
    scores = (WEIGHT * (images + images**3)).mean((1, 2, 3)) + images.std((1, 2, 3))
    return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool))


REWARD = Plain(colored, RewardSpec(differentiable=True))


def loaded(folder: Path, contrast: float = 1.0) -> Any:
    """contrast: factor on the decoder's last layer; with 0.1 every pixel lies inside (0, 1)."""
    policy: Any = load_policy(str(folder), trainable="none")
    for parameter in policy.model.vae.decoder.conv_out.parameters():
        parameter.data *= contrast
    return policy


def end_of(policy: Any, start: Tensor, guidance: float = 1.0, **arguments: Any) -> Tensor:
    conditions = policy.encode(as_records(PROMPTS), negative=guidance != 1.0)

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance)

    return unroll(velocity, start, policy.sigmas(STEPS, SHAPE[1:]), ODE(), **arguments).x


def scores_of(policy: Any, start: Tensor, guidance: float = 1.0, **arguments: Any) -> Tensor:
    """[N] float64, with graph if gradients are on."""
    images = policy.decode(end_of(policy, start, guidance, **arguments), grad=True)
    return score(REWARD, RewardBatch(prompts=PROMPTS, images=images), grad=True).scores[:, 0]


def gradient_of(policy: Any, guidance: float = 1.0, **arguments: Any) -> Tensor:
    start = START.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scores_of(policy, start, guidance, **arguments).sum(), start)
    return gradient


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_in_the_start_noise_is_that_of_finite_differences(tiny_pipeline: Path, guidance: float) -> None:
    """Row by row. Errors of the differences: rounding of the fp32 network over 2·eps, and eps²; at most 4e-4 as measured."""
    policy, eps = loaded(tiny_pipeline, contrast=0.1), 1e-2
    with torch.no_grad():
        images = policy.decode(end_of(policy, START, guidance))
        assert float(images.min()) > 0.01 and float(images.max()) < 0.99  # the clamp plays no part
    gradient = gradient_of(policy, guidance)
    for along in DIRECTIONS:
        with torch.no_grad():
            ahead, behind = (scores_of(policy, START + sign * eps * along, guidance) for sign in (1, -1))
        slopes = (ahead - behind) / (2 * eps)
        found = (gradient * along).double().sum((1, 2, 3))
        torch.testing.assert_close(found, slopes, rtol=2e-3, atol=0)


@pytest.mark.parametrize("arguments", [{}, {"active": (1, 2)}], ids=["all", "last_two"])
def test_checkpointing_gives_the_equal_gradient_and_evaluates_active_steps_again(
    tiny_pipeline: Path, arguments: dict[str, Any]
) -> None:
    policy, found = loaded(tiny_pipeline), {}
    for checkpoint in (False, True):
        before = policy.evaluations
        gradient = gradient_of(policy, checkpoint=checkpoint, **arguments)
        found[checkpoint] = gradient, (policy.evaluations - before) // len(PROMPTS)
    assert torch.equal(found[True][0], found[False][0]) and bool(found[True][0].any())
    assert (found[False][1], found[True][1]) == (STEPS, STEPS + len(arguments.get("active", range(STEPS))))


def test_a_row_has_no_gradient_from_the_others(tiny_pipeline: Path) -> None:
    policy, start = loaded(tiny_pipeline), START.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scores_of(policy, start)[1], start)
    assert not gradient[0].any() and gradient[1].any()


def test_beyond_the_range_the_gradient_is_the_rewards_at_the_clamped_value_times_the_unclamped_jacobian(
    tiny_pipeline: Path,
) -> None:
    """Straight-through: the score of a saturated pixel is flat in the latents, but its gradient is not 0. It is
    ∂score/∂pixel at 0 or 1, times ∂(unclamped pixel)/∂latents."""
    policy = loaded(tiny_pipeline)
    latents = end_of(policy, START).detach().requires_grad_()
    raw = policy.model.decode(latents) * 0.5 + 0.5
    outside = (raw < -0.01) | (raw > 1.01)
    assert 0.1 < float(outside.float().mean()) < 0.9

    def saturated(batch: RewardBatch) -> RewardOutput:
        """Reads the pixels outside the range only; slope of a pixel p: 1 + 3 p², 1 below and 4 above the range."""
        assert batch.images is not None
        scores = torch.where(outside, batch.images + batch.images**3, 0).sum((1, 2, 3))
        return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool))

    def total(at: Tensor) -> Tensor:
        batch = RewardBatch(prompts=PROMPTS, images=policy.decode(at, grad=True))
        reward = Plain(saturated, RewardSpec(differentiable=True))
        return score(reward, batch, grad=torch.is_grad_enabled()).scores.sum()

    (found,) = torch.autograd.grad(total(latents), latents)
    slope = torch.where(raw < 0, 1.0, 4.0) * outside
    (expected,) = torch.autograd.grad(raw, latents, slope)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert float(found.abs().mean()) > 0.1
    with torch.no_grad():  # the score itself is flat
        assert total(latents) == total(latents + 1e-4 * DIRECTIONS[0])
