"""Images larger than a tile go through the VAE in tiles: diffusers' own, also with a gradient, and only while the policy asks."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, VQModel

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.forecast.footprint import Footprint
from flowalign.glyphs.parts import build_pipeline
from flowalign.models import load_policy
from flowalign.models.checks import check_vae_tiling
from flowalign.models.vae_tiles import check_tiling
from flowalign.run.places import Place

TILE = 16
LATENTS = torch.randn(2, 3, 24, 48, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 24, 48, generator=torch.Generator().manual_seed(1))
TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


@pytest.fixture
def small_tiles(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline whose VAE has tiles of 16 × 16 pixels."""
    folder = tmp_path / "pipeline"
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": TILE}))
    return folder


def live(folder: Path) -> StableDiffusion3Pipeline:
    pipeline: StableDiffusion3Pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    return pipeline


def test_tiles_are_those_of_the_pipeline(small_tiles: Path) -> None:
    tiled, whole = (load_policy(str(small_tiles), trainable="none", vae_tiling=tiles) for tiles in (True, False))
    pipe = live(small_tiles)
    exec("\n".join(tiled.pipeline_setup()), {"pipe": pipe})
    vae = pipe.vae
    expected = vae.decode(LATENTS / vae.config.scaling_factor + vae.config.shift_factor).sample.detach()
    assert torch.equal(tiled.decode(LATENTS), (expected / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(tiled.decode(LATENTS), whole.decode(LATENTS))
    mean = vae.encode(IMAGES * 2 - 1).latent_dist.mode().detach()
    assert torch.equal(tiled.encode_images(IMAGES), (mean - vae.config.shift_factor) * vae.config.scaling_factor)
    assert not torch.equal(tiled.encode_images(IMAGES), whole.encode_images(IMAGES))
    assert whole.pipeline_setup() == []


def test_an_image_that_is_no_larger_than_a_tile_is_whole(tiny_pipeline: Path) -> None:
    tiled, whole = (load_policy(str(tiny_pipeline), trainable="none", vae_tiling=tiles) for tiles in (True, False))
    assert torch.equal(tiled.decode(LATENTS), whole.decode(LATENTS))


def test_the_decoder_never_sees_more_than_a_tile(small_tiles: Path) -> None:
    policy: Any = load_policy(str(small_tiles), trainable="none", vae_tiling=True)
    seen: set[tuple[int, ...]] = set()
    policy.model.vae.decoder.register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[2:])))
    policy.decode(LATENTS)
    assert max(max(shape) for shape in seen) == TILE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_through_tiles_is_the_finite_difference(small_tiles: Path, checkpointing: bool) -> None:
    """In fp64, along a random direction, of the unclamped image."""
    pipeline = live(small_tiles).to(torch.float64)
    policy = load_policy(pipeline, trainable="none", vae_tiling=True, gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(LATENTS.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(LATENTS.shape, generator=generator)
    latents = LATENTS.double().requires_grad_()
    (gradient,) = torch.autograd.grad((policy.decode(latents, grad=True) * weight).sum(), latents)

    def moved(step: float) -> torch.Tensor:
        pipeline.vae.enable_tiling()
        shifted = (LATENTS + step * direction) / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        return ((pipeline.vae.decode(shifted).sample * 0.5 + 0.5) * weight).sum().detach()

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_a_live_pipeline_keeps_its_own_setting(small_tiles: Path, own: bool) -> None:
    pipeline = live(small_tiles)
    pipeline.vae.use_tiling = own
    before = pipeline.vae.decode(LATENTS).sample
    asked = load_policy(pipeline, trainable="none", vae_tiling=True)
    asked.decode(LATENTS)
    asked.encode_images(IMAGES)
    with pytest.raises(RuntimeError):
        asked.decode(torch.zeros(1, 5, 24, 48))
    assert pipeline.vae.use_tiling is own
    assert torch.equal(pipeline.vae.decode(LATENTS).sample, before)
    plain = load_policy(pipeline, trainable="none")
    assert torch.equal(plain.decode(LATENTS), asked.decode(LATENTS)) is own  # without being asked: as the pipeline


def test_the_forecast_counts_a_tile_and_with_a_gradient_all_of_them(small_tiles: Path) -> None:
    """96 × 96 pixels, tiles of 16 which overlap by 4: eight by eight tiles, together 16 / 9 of the image. The decoder's widest tensors
    are of one tile; beside them lie the image and its tiles, 3 channels."""

    def footprint(tiling: bool) -> Footprint:
        overrides = ["policy.height=96", "policy.width=96", f"policy.vae_tiling={tiling}"]
        config, _ = load_config(TINY, [f"policy.path={small_tiles}", *overrides])
        return Footprint(config)

    tiled, whole = footprint(True), footprint(False)
    assert tiled.decode < 0.5 * whole.decode
    assert tiled.decode > (whole.pixels * 16) // 9  # what it gives is all there at the end
    assert whole.decode_with_gradient < tiled.decode_with_gradient < 2 * whole.decode_with_gradient


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "name",
    ["AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLHunyuanVideo", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderKLLTXVideo"],
)  # fmt: skip
def test_vaes_with_tiles(name: str) -> None:
    check_tiling(getattr(diffusers, name))


@pytest.mark.parametrize(
    "name", ["AsymmetricAutoencoderKL", "VQModel", "AutoencoderKLCosmos"]
)  # the last one ignores it
def test_vaes_without_tiles(name: str) -> None:
    with pytest.raises(ValueError, match=rf"vae_tiling=true for a {name}, which diffusers does not decode in tiles"):
        check_tiling(getattr(diffusers, name))


def test_a_checkpoint_without_tiles_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build_pipeline()
    pipeline.register_modules(vae=VQModel(block_out_channels=(8,), latent_channels=3, norm_num_groups=1))
    pipeline.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr("flowalign.models.load.read_pipeline", lambda *_, **__: pytest.fail("weights are read"))
    path = f"{tmp_path}/pipeline"
    load_config(TINY, [f"policy.path={path}"])
    with pytest.raises(ConfigError, match="vae_tiling=true for a VQModel"):
        load_config(TINY, [f"policy.path={path}", "policy.vae_tiling=true"])
    with pytest.raises(ValueError, match="vae_tiling=true for a VQModel"):
        load_policy(path, vae_tiling=True)
    check_vae_tiling(path, False)
    with pytest.raises(ValueError, match="vae_tiling=true for a VQModel"):
        load_policy(pipeline, vae_tiling=True)


def test_tiles_are_part_of_what_an_evaluation_is_of(small_tiles: Path) -> None:
    place = Place.of(str(small_tiles))
    config, _ = load_config(TINY, [f"policy.path={small_tiles}", "policy.vae_tiling=true"])
    tiled = Place(place.text, config.policy, None, None)
    assert tiled.weights["vae_tiling"] is True and "vae_tiling" not in place.weights
