"""Where parts are while they work, the VAE's own dtype, and images with a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.glyphs import PIPELINE
from flowalign.glyphs.renderer import render
from flowalign.models import load_policy
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.load import read_pipeline
from flowalign.models.pipeline_policy import PipelinePolicy
from flowalign.models.trained_networks import TrainedNetworks
from tests.helpers.families import subject

LATENTS = torch.randn(3, 3, 24, 48, generator=torch.Generator().manual_seed(0))


def offloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PipelinePolicy, list[str]]:
    """A policy that takes "meta" for its device, and a log of where its parts are sent and what the model does. The parts are
    not really sent: this machine has one device."""
    loaded: Any = load_policy(str(folder), trainable="none")
    log: list[str] = []
    model = loaded.model
    for name, module in (("encoder", model.encoders[0]), ("encoder 2", model.encoders[1]), ("vae", model.vae)):
        monkeypatch.setattr(module, "to", lambda device, name=name: log.append(f"{name} {torch.device(device).type}"))
    for name, method in (("encode", model.encode), ("decode", model.decode)):
        monkeypatch.setattr(
            model, name, lambda given, *how, method=method, name=name: log.append(name) or method(given, *how)
        )
    policy = PipelinePolicy(
        model, FAMILY, TrainedNetworks(model.networks, has_lora=False), device="meta", offload=("encoders", "vae")
    )
    assert log == ["encoder cpu", "encoder 2 cpu", "vae cpu"]
    log.clear()
    return policy, log


def test_offloaded_parts_are_on_the_device_only_while_they_work(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, log = offloaded(tiny_pipeline, monkeypatch)
    conditions = policy.encode(as_records(["KITE", "MOON"]))
    there, back = ["encoder meta", "encoder 2 meta"], ["encoder cpu", "encoder 2 cpu"]
    assert log == [*there, "encode", "encode", *back]  # one visit for two texts
    assert {tensor.device.type for tensor in conditions.tensors.values()} == {"meta"}
    log.clear()
    policy.encode(as_records(["MOON"]))
    assert log == []  # known: nothing moves
    policy.decode(LATENTS)
    assert log == ["vae meta", "decode", "vae cpu"]
    log.clear()
    policy.decode(LATENTS, grad=True)
    assert log == ["vae meta", "decode"]  # its backward is still to come


def test_an_offloaded_part_returns_after_an_error(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, log = offloaded(tiny_pipeline, monkeypatch)
    with pytest.raises(RuntimeError):
        policy.decode(torch.zeros(1, 5, 24, 48))
    assert log[-1] == "vae cpu"


def test_offload_and_the_rest_are_reached_from_yaml(tiny_pipeline: Path) -> None:
    settings = [
        f"policy.path={tiny_pipeline}",
        "policy.offload=[vae]",
        "policy.decode_batch=2",
        "policy.vae_dtype=bf16",
    ]
    config, _ = load_config(str(Path(__file__).parents[1] / "data" / "tiny.yaml"), settings)
    assert config.policy.offload == ["vae"] and config.policy.decode_batch == 2 and config.policy.vae_dtype == "bf16"
    assert (config.policy.size.height, config.policy.size.width, config.policy.size.frames) == (24, 48, 1)


def test_decoding_in_slices_gives_the_same_images_in_order(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = load_policy(str(tiny_pipeline), trainable="none", decode_batch=2)
    whole = load_policy(str(tiny_pipeline), trainable="none").decode(LATENTS)
    sizes, decode = [], policy.model.decode
    monkeypatch.setattr(policy.model, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    torch.testing.assert_close(policy.decode(LATENTS), whole, rtol=0, atol=1e-5)
    assert sizes == [2, 1]


def test_images_are_encoded_in_slices_with_the_vae_at_work_only_then(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(3, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    policy: Any = load_policy(str(tiny_pipeline), trainable="none", decode_batch=2)
    whole = load_policy(str(tiny_pipeline), trainable="none").encode_images(images)
    sizes, encode = [], policy.model.encode_images
    monkeypatch.setattr(policy.model, "encode_images", lambda part: sizes.append(len(part)) or encode(part))
    torch.testing.assert_close(policy.encode_images(images), whole, rtol=0, atol=1e-5)
    assert sizes == [2, 1]
    moved, log = offloaded(tiny_pipeline, monkeypatch)
    moved.encode_images(images)
    assert log == ["vae meta", "vae cpu"]
    half: Any = load_policy(str(tiny_pipeline), vae_dtype="bf16", trainable="none")
    assert (
        half.model.encode_images(images).dtype == torch.bfloat16 and half.encode_images(images).dtype == torch.float32
    )


def test_a_shipped_glyph_survives_the_vae() -> None:
    """The trained VAE: encode, then decode, within its own error."""
    policy = load_policy(str(PIPELINE), trainable="none")
    picture = render(["KITE", "MOON"], ["red", "blue"], ["yellow", "white"])
    rebuilt = policy.decode(policy.encode_images(picture))
    assert float((rebuilt - picture).abs().mean()) < 0.02


def test_a_gradient_passes_the_clamp_and_the_values_do_not(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none")
    latents = (3 * LATENTS).requires_grad_()
    images = policy.decode(latents, grad=True)
    assert torch.equal(images.detach(), policy.decode(latents.detach()))
    assert bool((images == 0).any()) and bool((images == 1).any())
    # d images / d latents is that of the unclamped image everywhere
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(images.shape, generator=generator)
    (through,) = torch.autograd.grad((images * weight).sum(), latents)
    raw = policy.model.decode(latents) * 0.5 + 0.5  # type: ignore[attr-defined]
    (unclamped,) = torch.autograd.grad((raw * weight).sum(), latents)
    assert torch.equal(through, unclamped)
    assert not policy.decode(latents).requires_grad


def test_the_vae_has_a_dtype_of_its_own(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline), dtype="bf16", vae_dtype="fp32", trainable="none")
    network = policy.modules()["transformer"]
    assert network.dtype == torch.bfloat16 and policy.model.vae.dtype == torch.float32
    exact = load_policy(str(tiny_pipeline), trainable="none")
    assert torch.equal(policy.decode(LATENTS), exact.decode(LATENTS))  # never rounded to bf16
    dtypes: list[torch.dtype] = []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: dtypes.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )
    policy.velocity(LATENTS[:1], torch.tensor([0.5]), policy.encode(as_records(["KITE"])))
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux1_dev"])
def test_the_reported_call_decodes_with_a_vae_of_another_dtype(name: str) -> None:
    """Their calls give the VAE bf16 latents as they are."""
    family = subject(name)
    records = family.records(1)
    policy: Any = load_policy(family.folder, dtype="bf16", vae_dtype="fp32", trainable="none")
    pipe = read_pipeline(family.folder, dtype="bf16", vae_dtype="fp32")
    arguments = {**policy.pipeline_arguments(2.0, family.size), **policy.pipeline_inputs(records, 2.0, family.size)}
    call = {**arguments, "num_inference_steps": 2, "output_type": "pt"}
    with pytest.raises(RuntimeError, match="should be the same"):
        pipe(**call)
    exec("\n".join(policy.pipeline_setup()), {"pipe": pipe})
    assert pipe(**call).images.dtype == torch.float32
    same: Any = load_policy(family.folder, dtype="bf16", trainable="none")
    assert not [line for line in same.pipeline_setup() if "pipe.vae" in line]
