"""What holds for every reward of rewards/image: gradients, batches, sizes, dtypes, settings."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import (
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    Mix,
    Offloaded,
    PickScore,
    RewardBatch,
    RewardError,
    SourceSimilarity,
    score,
)
from tests.helpers import tiny_rewards as tiny

PROMPTS = ["a red cat", 'the word "MOON"', "", "two dogs", "a cat"]
MAKERS: dict[str, Callable[..., Any]] = {
    "aesthetic_linear": lambda **s: Aesthetic(str(tiny.aesthetic_head("linear")), str(tiny.clip(768)), **s),
    "aesthetic_relu": lambda **s: Aesthetic(str(tiny.aesthetic_head("relu")), str(tiny.clip(768)), **s),
    "clip_score": lambda **s: CLIPScore(str(tiny.clip()), **s),
    "clip_score_open_clip": lambda **s: CLIPScore(str(tiny.open_clip_folder()), **s),
    "pick_score": lambda **s: PickScore(str(tiny.clip()), **s),
    "hps": lambda **s: HPSv2(model=str(tiny.hps()), architecture=str(tiny.hps() / "architecture.json"), **s),
    "image_reward": lambda **s: ImageReward(str(tiny.image_reward()), tokenizer=str(tiny.image_reward()), **s),
    "source_similarity": lambda **s: SourceSimilarity(str(tiny.clip()), **s),
}
every = pytest.mark.parametrize("name", MAKERS)


@cache
def loaded(name: str) -> Any:
    reward = MAKERS[name]()
    reward.load()
    return reward


def with_settings(reward: Any, **settings: object) -> Any:
    """A copy that shares the loaded network."""
    other = copy(reward)
    vars(other).update(settings)
    return other


def batch(height: int = 24, width: int = 48, count: int = 5, dtype: torch.dtype = torch.float32) -> RewardBatch:
    """Smooth images, so that they still differ when they are made small."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    sources = [[image.flip(0).to(dtype)] for image in images]  # of other colors
    return RewardBatch(prompts=PROMPTS[:count], images=images.to(dtype), conditions=sources)


def total(reward: Any, images: Tensor) -> Tensor:
    return score(reward, replace(batch(count=len(images)), images=images), grad=True).scores.sum()


@every
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    reward, images = MAKERS[name](dtype="fp64"), batch(count=2, dtype=torch.float64).images
    assert images is not None
    leaf = images.clone().requires_grad_()
    value = total(reward, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.dtype == gradient.dtype == torch.float64 and bool(gradient.flatten(1).any(1).all())
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        slope = (total(reward, images + 1e-5 * along) - total(reward, images - 1e-5 * along)) / 2e-5
        torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-5, atol=1e-8)


@every
def test_pixels_get_a_gradient_and_parameters_none(name: str) -> None:
    reward, images = with_settings(loaded(name), quantize=True), batch().images
    assert images is not None
    total(reward, images.requires_grad_()).backward()
    assert images.grad is not None and bool(images.grad.isfinite().all()) and bool(images.grad.any())
    parameters = list(reward.scorer.network.parameters())
    assert parameters and not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
    assert not any(module.training for module in reward.scorer.network.modules())


@every
def test_neither_chunks_nor_order_nor_batch_mates_matter(name: str) -> None:
    whole, chunks, order = loaded(name), with_settings(loaded(name), batch_size=2), [3, 0, 4, 2, 1]
    expected = score(whole, batch()).scores
    assert len(expected.unique()) == 5
    near = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(score(chunks, batch()).scores, expected, **near)
    torch.testing.assert_close(score(whole, batch().select(order)).scores, expected[order], **near)
    for row in range(5):
        torch.testing.assert_close(score(whole, batch().select([row])).scores, expected[[row]], **near)
    assert score(whole, batch().select([])).scores.shape == (0, 1)
    images = batch().images
    assert images is not None
    gradients = [
        torch.autograd.grad(total(one, leaf := images.clone().requires_grad_()), leaf)[0] for one in (whole, chunks)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@every
def test_images_of_any_size_are_scored_about_as_with_pillow(name: str) -> None:
    rewards = [with_settings(loaded(name), **each) for each in ({"quantize": True}, {"preprocess": "pil"})]
    for height, width in ((17, 40), (61, 30), (32, 32), (224, 168), (300, 90)):
        tensor, pil = (score(reward, batch(height, width)).scores for reward in rewards)
        assert float((tensor - pil).abs().max()) < 0.1 * float(tensor.std()), (height, width)


@every
def test_low_precision_is_of_the_backbone_only(name: str) -> None:
    low = MAKERS[name](dtype="bf16")
    exact, rounded = (score(reward, batch()).scores for reward in (loaded(name), low))
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.03 * float(exact.abs().max())
    images = batch().images
    assert images is not None
    (gradient,) = torch.autograd.grad(total(low, images.requires_grad_()), images)
    assert bool(gradient.isfinite().all()) and bool(gradient.flatten(1).any(1).all())


@every
def test_uint8_and_floats_are_one_image_and_other_ranges_are_refused(name: str) -> None:
    reward, pixels = loaded(name), batch().pixels()
    floats, bytes_ = (replace(batch(), images=images) for images in (pixels.float() / 255, pixels))
    assert torch.equal(score(reward, floats).scores, score(reward, bytes_).scores)
    with pytest.raises(RewardError, match=r"got images in -1..[\d.]+; expected \[0, 1\]"):
        score(reward, replace(batch(), images=torch.linspace(-1, 1, 5 * 3 * 64).view(5, 3, 8, 8)))


@every
def test_close_frees_and_load_is_lazy(name: str) -> None:
    reward = MAKERS[name]()
    settings = repr(reward)
    assert reward.scorer is None
    before = score(reward, batch()).scores
    assert reward.scorer is not None and repr(reward) == settings
    reward.close()
    assert reward.scorer is None and torch.equal(score(reward, batch()).scores, before)


@every
def test_an_offloaded_network_leaves_after_each_call_but_not_before_a_backward(name: str, monkeypatch) -> None:
    reward, moves = with_settings(loaded(name)), []
    network = reward.scorer.network
    monkeypatch.setattr(network, "to", lambda device: moves.append(device))
    around = Offloaded(reward)
    assert torch.equal(score(around, batch()).scores, score(reward, batch()).scores)
    assert moves == [torch.device("cpu"), "cpu", torch.device("cpu")]  # to the images, away; to the images
    images = batch().images.requires_grad_()
    total(around, images).backward()
    assert moves[3:] == [torch.device("cpu")] and images.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="with a method `offload`"):
        Offloaded(Mix([reward], [1.0]))


@every
def test_the_spec_says_what_is_loaded(name: str) -> None:
    spec = MAKERS[name]().spec
    assert spec.inputs[0] == "images" and spec.licence and spec.checkpoint and spec.memory in ("S", "M")
    assert spec.differentiable and not MAKERS[name](preprocess="pil").spec.differentiable


def test_settings_that_cannot_be_are_refused_before_anything_is_loaded() -> None:
    for settings, message in (
        ({"preprocess": "jpeg"}, r"got preprocess='jpeg'; expected one of \('tensor', 'pil'\)"),
        ({"dtype": "int8"}, "got dtype='int8'"),
        ({"batch_size": 0}, "got batch_size=0; expected at least 1"),
        ({"preprocess": "pil", "quantize": True}, "got quantize=True with preprocess='pil'"),
    ):
        for made in (Aesthetic, CLIPScore, PickScore, HPSv2, ImageReward):
            with pytest.raises(ValueError, match=message):
                made(**settings)  # type: ignore[arg-type]
    for refused in (lambda: CLIPScore(scale="logit"), lambda: PickScore(scale="x"), lambda: HPSv2(version="v3")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected one of"):
            refused()


def test_a_missing_checkpoint_says_what_to_get() -> None:
    """A path at construction, a hub id when it is loaded."""
    for made in (CLIPScore, PickScore, ImageReward):
        with pytest.raises(FileNotFoundError, match=r"got model='./no/such', which does not exist"):
            made("./no/such")
        reward = made("nobody/nothing")
        with pytest.raises(FileNotFoundError, match=r"`hf download nobody/nothing"):
            reward.load()
    with pytest.raises(FileNotFoundError, match=r"huggingface.co/nobody/nothing/resolve/main/HPS_v2.1_compressed.pt"):
        HPSv2(model="nobody/nothing").load()
    with pytest.raises(
        ValueError, match=r"got model='hf-hub:nobody/nothing', which open_clip(?s:.*)`hf download nobody/nothing`"
    ):
        CLIPScore("hf-hub:nobody/nothing").load()


def test_a_mix_takes_the_largest_memory_and_names_all_checkpoints() -> None:
    spec = Mix([PickScore(), CLIPScore()], [1.0, 1.0]).spec
    assert spec.memory == "M" and spec.differentiable
    assert spec.checkpoint == "yuvalkirstain/PickScore_v1; openai/clip-vit-large-patch14"
