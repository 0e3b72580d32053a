"""What holds for every reward of rewards/qwen: gradients, batches, precision, settings."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import EditReward, HPSv3, RewardBatch, RewardError, VideoAlign, score
from tests.helpers import tiny_qwen as tiny

PROMPTS = ["a red cat", 'the word "MOON" on a wall', "", "two dogs", "a cat"]


@cache
def hpsv3(**settings: Any) -> HPSv3:
    return HPSv3(**{**tiny.ARGUMENTS["HPSv3"](), **settings})


@cache
def video_align(**settings: Any) -> VideoAlign:
    return VideoAlign(**{**tiny.ARGUMENTS["VideoAlign"](), **settings})


@cache
def edit_reward(**settings: Any) -> EditReward:
    return EditReward(**{**tiny.ARGUMENTS["EditReward"](), **settings})


every = pytest.mark.parametrize("made", [hpsv3, video_align, edit_reward], ids=lambda made: made.__name__)


def batch(count: int = 5, dtype: torch.dtype = torch.float32) -> RewardBatch:
    """Images, videos and source images, in [0.2, 0.8], which leaves room for differences."""
    generator = torch.Generator().manual_seed(0)
    drawn = 0.2 + 0.6 * torch.rand(count, 5, 3, 40, 60, generator=generator, dtype=torch.float64).to(dtype)
    sources = [[drawn[row, 4, :, : 30 + row]] for row in range(count)]
    return RewardBatch(prompts=PROMPTS[:count], images=drawn[:, 0], videos=drawn[:, :4], fps=4.0, conditions=sources)


def total(reward: Any, given: RewardBatch, pixels: Tensor) -> Tensor:
    seen = replace(given, videos=pixels) if reward.spec.inputs == ("videos",) else replace(given, images=pixels)
    return score(reward, seen, grad=True).scores.sum()


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, and rotations of patches, in fp32, which would leave three digits of a difference."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        halves = [x.chunk(2, -1) for x in (query, key)]
        turned = [torch.cat((-second, first), -1) for first, second in halves]
        return tuple(x * cos[:, None] + y * sin[:, None] for x, y in zip((query, key), turned, strict=True))

    for module, name in ((modeling_qwen2_vl, "Qwen2VLRMSNorm"), (modeling_qwen2_5_vl, "Qwen2_5_VLRMSNorm")):
        monkeypatch.setattr(getattr(module, name), "forward", norm)
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate)


@every
def test_the_gradient_is_that_of_finite_differences(made: Callable[..., Any], in_double: None) -> None:
    reward, given = made(dtype="fp64"), batch(2, torch.float64)
    pixels = vars(given)[reward.spec.inputs[0]]
    leaf = pixels.clone().requires_grad_()
    value = total(reward, given, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.dtype == gradient.dtype == torch.float64 and bool(gradient.flatten(1).any(1).all())
    for seed in (1, 2):
        along = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (total(reward, given, pixels + 1e-5 * along) - total(reward, given, pixels - 1e-5 * along)) / 2e-5
        torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-5, atol=1e-8)


@every
def test_pixels_get_a_gradient_and_parameters_none(made: Callable[..., Any]) -> None:
    reward, given = made(quantize=True), batch(2)
    pixels = vars(given)[reward.spec.inputs[0]].clone().requires_grad_()
    total(reward, given, pixels).backward()
    assert pixels.grad is not None and bool(pixels.grad.isfinite().all()) and bool(pixels.grad.any())
    parameters = list(reward.regressor.network.parameters())
    assert parameters and not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
    assert not any(module.training for module in reward.regressor.network.modules())
    assert not made(preprocess="pil").spec.differentiable


@every
@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_neither_chunks_nor_order_nor_batch_mates_matter(made: Callable[..., Any], positions: str) -> None:
    whole, chunks, order = (
        made(positions=positions, batch_size=5),
        made(positions=positions, batch_size=2),
        [3, 0, 4, 2, 1],
    )
    expected = score(whole, batch()).scores
    assert len(expected[:, 0].unique()) == 5
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(score(chunks, batch()).scores, expected, **near)
    torch.testing.assert_close(score(whole, batch().select(order)).scores, expected[order], **near)
    for row in (1, 2):  # the longest and the shortest prompt
        torch.testing.assert_close(score(whole, batch().select([row])).scores, expected[[row]], **near)
    assert score(whole, batch().select([])).scores.shape == (0, expected.shape[1])


@every
def test_one_sample_that_cannot_be_scored_harms_no_other(made: Callable[..., Any]) -> None:
    reward, given = made(), batch(3)
    prompts = [given.prompts[0], "<|Reward|><|TA_reward|>", given.prompts[2]]
    output, plain = score(reward, replace(given, prompts=prompts)), score(reward, given)
    assert output.valid.all(1).tolist() == output.valid.any(1).tolist() == [True, False, True]
    torch.testing.assert_close(output.scores[[0, 2]], plain.scores[[0, 2]], rtol=1e-4, atol=1e-5)


@every
def test_low_precision_and_pillow_are_near(made: Callable[..., Any]) -> None:
    exact, low, pil = (score(made(**how), batch()).scores for how in ({}, {"dtype": "bf16"}, {"preprocess": "pil"}))
    assert low.dtype == torch.float32 and 0 < float((low - exact).abs().max()) < 0.3
    assert 0 < float((pil - exact).abs().max()) < 0.1


@every
def test_close_frees_and_load_is_lazy(made: Callable[..., Any]) -> None:
    reward = replace(made())
    settings = repr(reward)
    assert reward.regressor is None
    before = score(reward, batch(2)).scores
    assert reward.regressor is not None and repr(reward) == settings
    reward.close()
    assert reward.regressor is None and torch.equal(score(reward, batch(2)).scores, before)


@every
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(made: Callable[..., Any]) -> None:
    for settings, message in (
        ({"positions": "rope"}, r"got positions='rope'; expected one of \('sequential', 'mrope'\)"),
        ({"rope": "fp8"}, "got rope='fp8'"),
        ({"preprocess": "jpeg"}, "got preprocess='jpeg'"),
        ({"dtype": "int8"}, "got dtype='int8'"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"preprocess": "pil", "quantize": True}, "got quantize=True with preprocess='pil'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**settings)
    with pytest.raises(ValueError, match="got pooling='max'"):
        edit_reward(pooling="max")


@every
def test_a_missing_checkpoint_says_what_to_get(made: Callable[..., Any]) -> None:
    for what in ("model", "base"):
        with pytest.raises(FileNotFoundError, match=f"got {what}='./no/such', which does not exist"):
            replace(made(), **{what: "./no/such"})
        with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
            replace(made(), **{what: "nobody/nothing"}).load()


@every
def test_images_in_other_ranges_are_refused(made: Callable[..., Any]) -> None:
    reward, given = made(), batch(2)
    name = reward.spec.inputs[0]
    with pytest.raises(RewardError, match=r"expected \[0, 1\]"):
        score(reward, replace(given, **{name: vars(given)[name] * 2 - 1}))
