"""Checked answers of a reward: of consecutive parts as one, and of some of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.base import RewardOutput


def cat(outputs: list[RewardOutput]) -> RewardOutput:
    """The checked answers of one reward on consecutive parts of a batch (at least one) as its answer on all of it.

    A component, or the uncertainty, that some parts lack is NaN there."""
    names = sorted({name for output in outputs for name in output.components})

    def joined(parts: list[Tensor | None], like: list[Tensor]) -> Tensor:
        filled = [
            torch.full_like(own, torch.nan) if part is None else part for part, own in zip(parts, like, strict=True)
        ]
        return torch.cat(filled)

    scores, one = (
        [output.scores for output in outputs],
        [output.scores.new_empty(len(output.scores)) for output in outputs],
    )
    uncertain = [output.uncertainty for output in outputs]
    return RewardOutput(
        torch.cat(scores),
        torch.cat([output.valid for output in outputs]),
        {name: joined([output.components.get(name) for output in outputs], one) for name in names},
        [text for output in outputs for text in output.info],
        sum(output.elapsed for output in outputs),
        None if all(part is None for part in uncertain) else joined(uncertain, scores),
        outputs[0].channels,
    )


def at_rows(output: RewardOutput, rows: Tensor) -> RewardOutput:
    """The answer on the samples `rows` [n] of those that were asked; -1: on none, so NaN and invalid. Keeps the graph."""

    def taken(part: Tensor) -> Tensor:
        if not len(part):
            return nothing(len(rows), part.shape[1:], part)
        index, missing = rows.clamp(min=0).to(part.device), (rows < 0).to(part.device)
        return torch.where(missing.reshape(-1, *[1] * (part.ndim - 1)), nothing(1, (), part), part[index])

    return RewardOutput(
        taken(output.scores),
        taken(output.valid),
        {name: taken(part) for name, part in output.components.items()},
        [output.info[row] if row >= 0 and output.info else "" for row in rows.tolist()],
        output.elapsed,
        None if output.uncertainty is None else taken(output.uncertainty),
        output.channels,
    )


def nothing(count: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """[count, *shape] NaN, or False for bools."""
    return like.new_full((count, *shape), False if like.dtype == torch.bool else torch.nan)


def no_answer(count: int, channels: int) -> RewardOutput:
    """The answer on samples that a reward did not get."""
    return RewardOutput(torch.full((count, channels), torch.nan), torch.zeros(count, channels, dtype=torch.bool))
