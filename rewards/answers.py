"""Checked answers of a reward: of consecutive parts as one, and of some of the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import RewardOutput


def cat(outputs: list[RewardOutput]) -> RewardOutput:
    """The checked answers of one reward on consecutive parts of a batch (at least one) as its answer on all of it.

    A component, or the uncertainty, that some parts lack is NaN there."""
    names = sorted({name for output in outputs for name in output.components})
    scores, uncertain = [output.scores for output in outputs], [output.uncertainty for output in outputs]

    def joined(parts: list[Tensor | None], like: list[Tensor]) -> Tensor:
        known = zip(parts, like, strict=True)
        return torch.cat([torch.full_like(other, torch.nan) if part is None else part for part, other in known])

    return RewardOutput(
        torch.cat(scores),
        torch.cat([output.valid for output in outputs]),
        {
            name: joined([output.components.get(name) for output in outputs], [each[:, 0] for each in scores])
            for name in names
        },
        [text for output in outputs for text in output.info],
        sum(output.elapsed for output in outputs),
        None if all(part is None for part in uncertain) else joined(uncertain, scores),
        outputs[0].channels,
    )


def at_rows(output: RewardOutput, rows: Tensor) -> RewardOutput:
    """The answer at the rows [n] of `output`; a row -1 is NaN and invalid. Keeps the graph."""

    def taken(part: Tensor) -> Tensor:
        empty = False if part.dtype == torch.bool else torch.nan
        if not len(part):
            return part.new_full((len(rows), *part.shape[1:]), empty)
        index, missing = rows.clamp(min=0).to(part.device), (rows < 0).to(part.device)
        return torch.where(missing.reshape(-1, *[1] * (part.ndim - 1)), part.new_tensor(empty), part[index])

    return RewardOutput(
        taken(output.scores),
        taken(output.valid),
        {name: taken(part) for name, part in output.components.items()},
        [output.info[row] if row >= 0 and output.info else "" for row in rows.tolist()],
        output.elapsed,
        None if output.uncertainty is None else taken(output.uncertainty),
        output.channels,
    )


def no_answer(count: int, channels: int, info: str = "") -> RewardOutput:
    """The answer on samples that have no score; info: why."""
    valid = torch.zeros(count, channels, dtype=torch.bool)
    return RewardOutput(torch.full((count, channels), torch.nan), valid, info=[info] * count)
