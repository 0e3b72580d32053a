"""FLUX.1: what the network is told of scale, level and source image; what schnell and Kontext do otherwise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowalign.config import load_config
from flowalign.data import PromptRecord
from flowalign.errors import ConfigError
from flowalign.models import Policy, Sampling, Size, load_policy
from flowalign.models.grid import pipeline_call, pipeline_latents
from flowalign.models.sampling import sample
from flowalign.testing import tiny_pipeline
from tests.helpers.families import subject

SIZE = Size(32, 64)


def told(pipeline: DiffusionPipeline, guidance_scale: float, records: list[PromptRecord]) -> Mapping[str, Any]:
    """What the transformer is called with at σ = 0.7."""
    policy, calls = load_policy(pipeline, trainable="none", sampling=Sampling(2, 3.5, SIZE)), []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    x = torch.arange(4 * 4 * 8.0).view(1, 4, 4, 8)
    policy.velocity(x, torch.tensor([0.7]), policy.encode(records), guidance_scale=guidance_scale)
    return calls[0]


def test_the_scale_is_an_input_of_dev_and_none_of_schnell() -> None:
    records, found = [PromptRecord(0, "a word")], {}
    for name in ("flux1_dev", "flux1_schnell"):
        pipeline = tiny_pipeline(name)
        call = told(pipeline, 3.5, records)
        assert call["timestep"].tolist() == pytest.approx([0.7], abs=1e-7)  # the network itself multiplies by 1000
        assert call["encoder_hidden_states"].shape[1] == {"flux1_dev": 512, "flux1_schnell": 256}[name]
        found[name] = call["guidance"]
    assert found["flux1_dev"].tolist() == [3.5] and found["flux1_dev"].dtype == torch.float32
    assert found["flux1_schnell"] is None
    with pytest.raises(ValueError, match="expected 1 to 256"):
        load_policy(tiny_pipeline("flux1_schnell"), max_sequence_length=512)


def test_dev_shifts_by_the_size_and_schnell_by_nothing() -> None:
    """e^μ σ / (1 + (e^μ − 1) σ) with μ from 0.5 at 256 tokens to 1.15 at 4096; and equal steps."""
    levels = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    dev, schnell = (load_policy(tiny_pipeline(name), trainable="none") for name in ("flux1_dev", "flux1_schnell"))
    for side, mu in ((32, 0.5), (128, 1.15)):
        scale = torch.tensor(mu).exp()
        torch.testing.assert_close(dev.sigmas(4, (4, side, side)), scale * levels / (1 + (scale - 1) * levels))
        assert torch.equal(schnell.sigmas(4, (4, side, side)), levels)


def test_an_embedded_scale_in_a_window_of_few_steps_is_no_classifier_free_guidance(large_machine: None) -> None:
    layers = [f"configs/{layer}.yaml" for layer in ("methods/mixgrpo", "models/flux1_dev", "rewards/jpeg")]
    config, _ = load_config(layers, [f"policy.path={subject('flux1_dev').folder}"])
    assert config.rollout.guidance_scale == 3.5 and not config.rollout.allow_cfg_update
    with pytest.raises(ConfigError, match="allow_cfg_update"):
        load_config(layers, [f"policy.path={subject('sd3').folder}"])


def test_a_negative_prompt_that_an_embedded_scale_would_ignore_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    """Of the policy, of the prompts that are trained on and of those held out; "" says nothing."""
    settings = [
        f"policy.path={subject('flux1_dev').folder}",
        "policy.lora.targets=null",
        "policy.height=32",
        "policy.width=64",
    ]
    for negative in ("ugly", ""):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat", "negative_prompt": negative}) + "\n")
        for key, value in (
            ("policy.negative_prompt", negative),
            ("prompts", f"{tmp_path}/prompts.jsonl"),
            ("evaluation.prompts", f"{tmp_path}/prompts.jsonl"),
        ):
            changed = [*settings, f"{key}={value!r}", "evaluation.count=1"]
            if negative:
                with pytest.raises(
                    ConfigError, match=r"'ugly'.* no unconditional half, so that this would silently do nothing"
                ):
                    load_config("tests/data/tiny.yaml", changed)
            else:
                load_config("tests/data/tiny.yaml", changed)


@pytest.mark.parametrize(
    ("family", "scales", "said"),
    [
        ("flux1_dev", "rollout.guidance_scale=3.5", "no unconditional half: it would silently do nothing"),
        ("sd3", "rollout.guidance_scale=1", "no unconditional half: it would silently do nothing"),
        ("sd3", "rollout.guidance_scale=3.5", None),
    ],
)
def test_a_gradient_is_kept_from_an_unconditional_half_only_where_there_is_one(
    family: str, scales: str, said: str | None
) -> None:
    """One row per state has none, whatever the scale."""
    settings = [
        f"policy.path={subject(family).folder}",
        "policy.lora.targets=null",
        "policy.height=32",
        "policy.width=64",
    ]
    settings += [scales, "rollout.allow_cfg_update=true", "rollout.detach_uncond=true"]
    if said is None:
        load_config("tests/data/tiny.yaml", settings)
        return
    with pytest.raises(ConfigError, match=said):
        load_config("tests/data/tiny.yaml", settings)


def test_an_update_of_another_embedded_scale_needs_no_negatives(large_machine: None) -> None:
    """DiffusionNFT at guidance 3.5 on a rollout without: with classifier-free guidance its prompts would lack negatives."""
    layers = [f"configs/{layer}.yaml" for layer in ("methods/nft", "models/flux1_dev", "rewards/jpeg")]
    scales = ["trainer.guidance_scale=3.5", "rollout.guidance_scale=1"]
    load_config(layers, [f"policy.path={subject('flux1_dev').folder}", *scales])
    with pytest.raises(ConfigError, match="whose prompts have no negatives"):
        load_config(layers, [f"policy.path={subject('sd3').folder}", *scales])


def picture(folder: Path, name: str, sides: tuple[int, int]) -> Path:
    pixels = torch.rand(*sides, 3, generator=torch.Generator().manual_seed(sides[0]))
    Image.fromarray((pixels * 255).byte().numpy()).save(folder / name)
    return folder / name


def test_the_source_image_has_the_places_of_the_state_under_number_1(tmp_path: Path) -> None:
    record = PromptRecord(0, "a word", images=(picture(tmp_path, "a.png", (40, 56)),))
    call = told(tiny_pipeline("flux1_kontext"), 2.5, [record])
    assert call["hidden_states"].shape == (1, 16, 16)  # 2 × 4 patches of each
    # channels vary slowest within a token, then rows: of the second patch of the first row
    assert call["hidden_states"][0, 1].tolist() == [
        32 * c + 8 * i + 2 + j for c in range(4) for i in (0, 1) for j in (0, 1)
    ]
    places = [[number, row, column] for number in (0, 1) for row in range(2) for column in range(4)]
    assert call["img_ids"].tolist() == places and not call["txt_ids"].any()


def test_sources_of_any_size_are_fitted_to_what_is_generated_as_the_exported_call_does(tmp_path: Path) -> None:
    """Two pictures of different sides in one batch, difference 0; the image matters."""
    kontext, sampling = subject("flux1_kontext"), Sampling(2, 2.5, SIZE)
    policy = kontext.policy(trainable="none", sampling=sampling)
    records = [
        PromptRecord(n, "a word", images=(picture(tmp_path, f"{n}.png", sides),))
        for n, sides in enumerate([(40, 56), (90, 33)])
    ]
    noise = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    pipeline = kontext.pipeline(pipeline_call(policy, sampling)[0], policy)
    with torch.no_grad():
        theirs = pipeline_latents(pipeline, policy, records, noise, sampling)
    ours = sample(policy, policy.encode(records, together=True), noise, 2, 2.5)
    assert torch.equal(ours, theirs)
    assert float((ours[0] - ours[1]).norm()) > 1e-3 * float(ours[0].norm())


def test_a_source_image_needs_a_size_and_the_vae(tmp_path: Path) -> None:
    record = PromptRecord(0, "a word", images=(picture(tmp_path, "a.png", (40, 56)),))
    policy: Any = load_policy(
        subject("flux1_kontext").folder, trainable="none", device="cpu", offload=["encoders", "vae"]
    )
    seen: list[str] = []
    vae_to = policy.model.vae.to
    policy.model.vae.to = lambda device: (seen.append(str(device)), vae_to(device))[1]
    assert source(policy, record, Size(64, 32)).shape == (1, 4, 8, 4)
    assert seen == ["cpu", "cpu"]  # to work, and back
    policy.sampling = None
    with pytest.raises(ValueError, match="no size to fit them to"):
        policy.encode([record])


def source(policy: Policy, record: PromptRecord, size: Size) -> Tensor:
    return policy.encode([record], size=size).tensors["source"]
