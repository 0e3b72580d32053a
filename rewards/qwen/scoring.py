"""What the rewards of this folder share: their settings, and how a loaded network scores a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput
from rewards.image.scorer import Settings, check_choice
from rewards.image.scorer import check_settings as check_shared
from rewards.judges.template import Templates
from rewards.qwen.regressor import Positions, Regressor, Rope

FRAME_PIXELS = 200_704  # 256 tokens of 28 x 28 pixels: of an image or a frame in all published configurations

Answers = tuple[Tensor, list[str]]  # [n, ...] and, per sample, why it has none


class QwenReward(Settings, Protocol):
    """A reward of this folder: settings (rewards.image.scorer.Settings), and `build`, which loads.

    positions, rope: see rewards.qwen.regressor.load_regressor. The networks were trained on pictures as "pil" resizes them.
    """

    positions: Positions
    rope: Rope
    regressor: Regressor | None  # once it is loaded

    def build(self) -> Regressor: ...


def check_settings(reward: QwenReward) -> None:
    """ValueError for a setting that cannot be."""
    check_shared(reward)
    check_choice("positions", reward.positions, Positions)
    check_choice("rope", reward.rope, Rope)


def load_regressor_of(reward: QwenReward) -> None:
    """The `load` of a reward of this folder."""
    if reward.regressor is None:
        reward.regressor = reward.build()


def close_regressor(reward: QwenReward) -> None:
    """The `close` of a reward of this folder."""
    reward.regressor = None


def offload_regressor(reward: QwenReward) -> None:
    """The `offload` of a reward of this folder."""
    if reward.regressor is not None:
        reward.regressor.network.to("cpu")


def in_chunks(reward: QwenReward, batch: RewardBatch, ask: Callable[[Regressor, RewardBatch], Answers]) -> Answers:
    """What `ask` says of the batch, `batch_size` samples at a time, on the reward's device."""
    load_regressor_of(reward)
    assert reward.regressor is not None
    if reward.device is not None:
        batch = batch.to(reward.device)
    device = next(tensor.device for tensor in (batch.videos, batch.images) if tensor is not None)
    reward.regressor.network.to(device)
    chunks = [
        ask(reward.regressor, batch.select(range(first, min(first + reward.batch_size, len(batch)))))
        for first in range(0, len(batch), reward.batch_size)
    ]
    return torch.cat([values for values, _ in chunks]), [reason for _, reasons in chunks for reason in reasons]


def regressed(
    scores: Tensor,
    info: list[str],
    templates: Templates,
    parts: Mapping[str, Tensor] | None = None,
    uncertainty: Tensor | None = None,
) -> RewardOutput:
    """Valid where finite; with the component noncanonical_template, 0 or 1 for all samples. float32 unless a gradient is wanted."""
    flag = torch.full((len(scores),), float(templates.noncanonical))
    return RewardOutput(
        scores if torch.is_grad_enabled() else scores.float(),
        torch.isfinite(scores),
        {name: part.detach().float() for name, part in (parts or {}).items()} | {"noncanonical_template": flag},
        info,
        uncertainty=None if uncertainty is None else uncertainty.detach().float(),
    )


def check_unit(pixels: Tensor, what: str) -> None:
    """ValueError if a value lies more than 1e-3 outside [0, 1], as RewardBatch.unit_images."""
    low, high = (float(bound) for bound in pixels.detach().aminmax())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"got {what} in {low:.3g}..{high:.3g}; expected [0, 1]: rescale what the decoder returns")
