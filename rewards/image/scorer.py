"""What the rewards of this folder share: their settings, and how a loaded network scores a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardBatch, RewardOutput
from rewards.image.preprocess import Mode, Preprocess

Dtype = Literal["fp32", "bf16", "fp16", "fp64"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, eq=False)
class Scorer:
    """A loaded reward. score: (pixels [n, 3, S, S] in the backbone's dtype, n prompts) -> [n]. network: all that moves to the device."""

    network: nn.Module
    preprocess: Preprocess
    score: Callable[[Tensor, list[str]], Tensor]


class Settings(Protocol):
    """What every reward of a loaded network can be told.

    preprocess: "tensor", or "pil" for Pillow's 8-bit resampling, without gradient, to compare with. quantize: tensor mode
    rounds to 8 bits as Pillow's images are, with a straight-through gradient. dtype: of the backbone; norms and head are fp32
    (fp64 with an fp64 backbone, for finite differences). device: None is the images'. batch_size: of one forward pass;
    it bounds memory without gradients only.
    """

    preprocess: Mode
    quantize: bool
    dtype: Dtype
    device: str | None
    batch_size: int


class ImageScorer(Settings, Protocol):
    """A reward of this folder: settings, and `build`, which loads."""

    scorer: Scorer | None  # once it is loaded

    def build(self) -> Scorer: ...


def check_settings(reward: Settings) -> None:
    """ValueError for a setting that cannot be."""
    check_choice("preprocess", reward.preprocess, Mode)
    check_choice("dtype", reward.dtype, Dtype)
    if reward.preprocess == "pil" and reward.quantize:
        raise ValueError(
            "got quantize=True with preprocess='pil'; expected quantize=False: Pillow's images have 8 bits"
        )
    if reward.batch_size < 1:
        raise ValueError(f"got batch_size={reward.batch_size}; expected at least 1")


def check_choice(name: str, value: str, choices: Any) -> None:
    """ValueError unless `value` is one of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"got {name}={value!r}; expected one of {get_args(choices)}")


def load_scorer(reward: ImageScorer) -> None:
    """The `load` of a reward of this folder."""
    if reward.scorer is None:
        reward.scorer = reward.build()


def close_scorer(reward: ImageScorer) -> None:
    """The `close` of a reward of this folder."""
    reward.scorer = None


def offload_scorer(reward: ImageScorer) -> None:
    """The `offload` of a reward of this folder."""
    if reward.scorer is not None:
        reward.scorer.network.to("cpu")


def call_scorer(reward: ImageScorer, batch: RewardBatch) -> RewardOutput:
    """The `__call__` of a reward of this folder."""
    load_scorer(reward)
    assert reward.scorer is not None
    scorer, images, dtype = reward.scorer, batch.unit_images(), DTYPES[reward.dtype]
    images = images.to(reward.device or images.device, at_least_fp32(dtype))
    scorer.network.to(images.device)
    parts = []
    for first in range(0, len(batch), reward.batch_size):
        rows = slice(first, first + reward.batch_size)
        pixels = scorer.preprocess(images[rows], reward.preprocess, reward.quantize)
        parts.append(scorer.score(pixels.to(dtype), batch.prompts[rows]))
    scores = torch.cat(parts)
    return RewardOutput(scores if torch.is_grad_enabled() else scores.float(), torch.isfinite(scores))


def frozen(network: nn.Module, dtype: torch.dtype) -> Any:
    """The network in eval mode (no dropout), without gradients of its own parameters."""
    return network.eval().requires_grad_(False).to(dtype)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Of norms, heads and scores beside a backbone of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(values: Tensor) -> Tensor:
    """In fp32 at least."""
    return values.to(at_least_fp32(values.dtype))


def unit(features: Tensor) -> Tensor:
    """The rows of [n, D], in fp32 at least, with norm 1; a row of zeros stays one."""
    return F.normalize(wide(features), dim=1)
