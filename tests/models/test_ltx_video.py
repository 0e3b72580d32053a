"""What LTX-Video does beside the contract of all families: a decoder that reads a timestep or draws noise, and its frame rate."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.models import Sampling, load_policy
from flowalign.models.checks import check_image_size
from flowalign.models.families.ltx_video import FAMILY
from flowalign.models.grid import pipeline_call
from flowalign.models.sampling import sample
from tests.helpers.families import Subject, subject


def with_vae(folder: Path, **changed: Any) -> Subject:
    """The tiny pipeline with another VAE: its configuration with `changed`."""
    shutil.copytree(subject("ltx_video").folder, folder)
    torch.manual_seed(0)
    kind, settings = FAMILY.tiny["ltx_video"]["vae"]
    kind(**settings, **changed).save_pretrained(folder / "vae")
    return Subject("ltx_video", str(folder))


def test_a_decoder_that_reads_a_timestep_decodes_as_the_pipelines_call(tmp_path: Path) -> None:
    """At its default, 0, without noise."""
    family = with_vae(tmp_path / "pipe", timestep_conditioning=True)
    sampling = Sampling(2, 1.0, family.size)
    policy, records = family.policy(trainable="none", sampling=sampling), family.records(2)
    noise = torch.randn(2, *policy.latent_shape(family.size), generator=torch.Generator().manual_seed(0))
    setup, arguments = pipeline_call(policy, sampling)
    inputs = policy.pipeline_inputs(records, 1.0, family.size)
    pipeline = family.pipeline(setup, policy)
    (theirs,) = pipeline(**arguments, **inputs, latents=policy.to_pipeline(noise), output_type="pt", return_dict=False)
    ours = policy.decode(sample(policy, policy.encode(records, together=True), noise, 2, 1.0))
    assert torch.equal(ours, theirs)
    (later,) = pipeline(
        **arguments, **inputs, latents=policy.to_pipeline(noise), output_type="pt", return_dict=False,
        decode_timestep=0.5, decode_noise_scale=0.0,
    )  # fmt: skip
    assert not torch.equal(ours, later)


def test_a_decoder_that_draws_noise_is_refused(tmp_path: Path) -> None:
    family = with_vae(tmp_path / "pipe", decoder_inject_noise=(True, False, False, False, False))
    with pytest.raises(ValueError, match="whose decoder draws none"):
        check_image_size(family.folder, subject("ltx_video").size)
    with pytest.raises(ValueError, match="decoder_inject_noise"):
        load_policy(family.folder)


def test_frames_lie_in_time_by_the_frame_rate() -> None:
    """8 frames to a latent; one frame has no duration."""
    family = subject("ltx_video")
    slow, fast = (family.policy(trainable="none", options={"frame_rate": rate}) for rate in (8, 25))
    seen: list[Any] = []
    slow.modules()["transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["rope_interpolation_scale"]), with_kwargs=True
    )
    for frames, equal in ((family.size, False), (family.sizes[2], True)):
        x = torch.randn(1, *slow.latent_shape(frames), generator=torch.Generator().manual_seed(0))
        ours, theirs = (
            policy.velocity(x, torch.full((1,), 0.5), policy.encode(family.records(1))) for policy in (slow, fast)
        )
        assert torch.equal(ours, theirs) is equal
    assert seen == [(1.0, 32, 32)] * 2
    assert fast.pipeline_arguments(3.0, family.size)["frame_rate"] == 25
    with pytest.raises(ValueError, match="got frame_rate=0; expected"):
        family.policy(options={"frame_rate": 0})
