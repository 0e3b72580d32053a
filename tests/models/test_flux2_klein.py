"""FLUX.2 klein: two kinds of checkpoint, its only negative prompt, and latents normalized by the VAE's batch norm."""

from typing import Any

import pytest
import torch

from flowalign.data import PromptRecord
from flowalign.models import Sampling, Size
from flowalign.models.checks import rows_per_state
from tests.helpers.families import subject

SIZE = Size(32, 64)


def policy_of(name: str, **arguments: Any) -> Any:
    return subject(name).policy(trainable="none", sampling=Sampling(4, 3.0, SIZE), **arguments)


def test_a_distilled_checkpoint_ignores_the_guidance_scale_and_takes_one_row() -> None:
    distilled, base = policy_of("flux2_klein"), policy_of("flux2_klein_base")
    assert [rows_per_state(subject(name).folder, 3.0) for name in ("flux2_klein", "flux2_klein_base")] == [1, 2]
    x, sigma = torch.randn(2, *base.latent_shape(SIZE)), torch.tensor([0.9, 0.3])
    for policy, differs in ((distilled, False), (base, True)):
        conditions = policy.encode(subject("flux2_klein").records(2), negative=differs)
        plain, guided = (policy.velocity(x, sigma, conditions, guidance_scale=scale) for scale in (1.0, 3.0))
        assert torch.equal(plain, guided) != differs
        assert policy.evaluations == (6 if differs else 4)


def test_a_negative_prompt_that_the_pipeline_would_not_take_is_refused() -> None:
    for name in ("flux2_klein", "flux2_klein_base"):
        with pytest.raises(ValueError, match=r"got the negative prompt 'a dog' for a Flux2KleinPipeline.*takes none"):
            policy_of(name, negative_prompt="a dog")
        with pytest.raises(ValueError, match="got the negative prompt 'a dog'"):
            policy_of(name).encode([PromptRecord(0, "a word", negative_prompt="a dog")])
        policy_of(name).encode([PromptRecord(0, "a word", negative_prompt="")])


def test_encoded_images_are_normalized_as_the_pipeline_does_with_its_references() -> None:
    """By the statistics of each channel of a 2×2 patch, and unpacked: bit for bit."""
    policy = policy_of("flux2_klein")
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    ours = policy.to_pipeline(policy.encode_images(images))
    with torch.no_grad():
        theirs = policy.model.pipeline._encode_vae_image(images * 2 - 1, generator=None)
    assert torch.equal(ours, theirs)
    statistics = policy.model.vae.bn
    assert float(statistics.running_mean.min()) > 0.4 and float(statistics.running_var.std()) > 0.1  # they matter here


def test_levels_are_rounded_to_bf16_as_by_the_pipeline() -> None:
    """Twice: 1000·σ, and that by 1000."""
    policy = policy_of("flux2_klein", dtype="bf16")
    network, seen = policy.modules()["transformer"], []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].to(torch.bfloat16)), with_kwargs=True
    )
    records = subject("flux2_klein").records(1)
    policy.model.pipeline(
        **policy.pipeline_arguments(1.0, SIZE), **policy.pipeline_inputs(records, 1.0, SIZE), num_inference_steps=8, output_type="latent"
    )  # fmt: skip
    theirs = torch.cat(seen)
    seen.clear()
    sigmas = policy.sigmas(8, policy.latent_shape(SIZE))[:-1]
    x = torch.randn(8, *policy.latent_shape(SIZE))
    policy.velocity(x, sigmas, policy.encode(records).rows(torch.zeros(8, dtype=torch.long)))
    assert torch.equal(seen[0], theirs)
    assert not torch.equal(sigmas.to(torch.bfloat16), theirs)
