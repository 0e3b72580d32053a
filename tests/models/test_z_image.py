"""Z-Image: the rules of its guidance, and rows of text of different length."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models import Sampling, Size
from flowalign.models.grid import pipeline_latents
from flowalign.models.sampling import sample
from tests.helpers.families import subject

SIZE = Size(32, 64)
FAMILY = subject("z_image")


def policy_of(**options: float) -> Any:
    return FAMILY.policy(trainable="none", sampling=Sampling(4, 3.0, SIZE), options=options)


def states(policy: Any) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.9, 0.3, 0.6])


def velocities(policy: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(conditional, unconditional, guided with 3)."""
    (x, sigma), conditions = states(policy), policy.encode(FAMILY.records(), negative=True)
    plain = [policy.velocity(x, sigma, rows) for rows in (conditions, conditions.negative)]
    return *plain, policy.velocity(x, sigma, conditions, guidance_scale=3.0)


def test_the_scale_is_the_pipelines_own_number_and_1_is_none() -> None:
    policy = policy_of()
    own, other, guided = velocities(policy)
    torch.testing.assert_close(guided, own + 3 * (own - other), rtol=1e-5, atol=1e-5)
    assert [policy.pipeline_arguments(scale, SIZE)["guidance_scale"] for scale in (1.0, 3.0)] == [0.0, 3.0]


def test_the_norm_of_a_guided_velocity_is_bounded_by_that_of_the_conditional_one() -> None:
    own, other, guided = velocities(policy_of(cfg_normalization=1.2))
    free = own + 3 * (own - other)
    largest, norm = (v.flatten(1).norm(dim=1) for v in (own, free))
    assert bool((norm > 1.2 * largest).any())
    by_hand = free * (1.2 * largest / norm).clamp(max=1)[:, None, None, None]
    torch.testing.assert_close(guided, by_hand, rtol=1e-5, atol=1e-5)


def test_above_the_truncation_there_is_no_guidance_and_one_row() -> None:
    """σ = 0.3 is 0.7 of the way to the data; the three states are one call."""
    policy = policy_of(cfg_truncation=0.5)
    own, other, guided = velocities(policy)
    assert policy.evaluations == 3 + 3 + 5
    torch.testing.assert_close(guided[1], own[1], rtol=1e-5, atol=1e-5)
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(guided[kept], (own + 3 * (own - other))[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"cfg_truncation": 0.1}, 2 + 2 + 1 + 1), ({"cfg_normalization": 0.9}, 8), ({"cfg_truncation": 0.0}, 5)],
    ids=str,
)
def test_with_its_options_the_rollout_is_the_pipelines(options: dict[str, float], rows: int) -> None:
    """Shift 6 leaves the levels 1, .947, .857 and .667."""
    policy, sampling = policy_of(**options), Sampling(4, 3.0, SIZE)
    records = FAMILY.records()
    noise, _ = states(policy)
    with torch.no_grad():
        theirs = pipeline_latents(FAMILY.pipeline([], policy), policy, records, noise, sampling)
    ours = sample(policy, policy.encode(records, negative=True, together=True), noise, 4, 3.0)
    assert torch.equal(ours, theirs)
    assert policy.evaluations == 3 * rows


@pytest.mark.parametrize(
    "options", [{"cfg_truncation": 1.5}, {"cfg_truncation": -0.1}, {"cfg_normalization": -1.0}], ids=str
)
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a truncation from 0 to 1"):
        policy_of(**options)


def test_without_a_gradient_through_the_unconditional_half_the_value_is_the_same() -> None:
    policy = policy_of()
    (x, sigma), conditions = states(policy), policy.encode(FAMILY.records(), negative=True)
    found, gradients = [], []
    for detach in (False, True):
        state = x.clone().requires_grad_()
        v = policy.velocity(state, sigma, conditions, guidance_scale=3.0, detach_uncond=detach)
        found.append(v.detach())
        gradients.append(torch.autograd.grad(v.square().sum(), state)[0])
    plain = x.clone().requires_grad_()
    v = policy.velocity(plain, sigma, conditions)
    conditional = torch.autograd.grad((2 * found[1] * 4 * v).sum(), plain)[0]  # v_c + 3·(v_c − v_u): 4 times ∂v_c
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], conditional, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
