"""Columns of an evaluation made up without a model, and their metrics.json."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from flowalign.evaluation.columns import Evaluation, metrics
from flowalign.evaluation.evaluate import EvaluationResult

Columns = dict[str, EvaluationResult]


def made_up(
    names: Sequence[str] = ("base", "tuned"), prompts: Sequence[str] | int = 10, rewards: Sequence[str] = ("ocr", "jpeg"),
    size: tuple[int, int] = (12, 24), frames: int = 0, samples: int = 1, edits: bool = False,
) -> Columns:  # fmt: skip
    """Later columns score higher by the first reward and lower by the others; one score of the last column is nan. edits: of source
    images, twice as wide as the results."""
    generator = torch.Generator().manual_seed(0)
    texts = [f"the word {n} in red" for n in range(prompts)] if isinstance(prompts, int) else list(prompts)
    count = len(texts) * samples
    sources = {
        100 + place: torch.full((3, size[0], 2 * size[1]), place, dtype=torch.uint8) for place in range(len(texts))
    }
    columns = {}
    for place, name in enumerate(names):
        scores = {
            reward: torch.rand(count, generator=generator).double() + place * (0.5 if number == 0 else -0.5)
            for number, reward in enumerate(rewards)
        }
        if place == len(names) - 1 and count > 4:
            scores[rewards[0]][3] = math.nan
        shape = (count, frames, 3, *size) if frames else (count, 3, *size)
        pixels = (torch.rand(shape, generator=generator) * 255).to(torch.uint8)
        columns[name] = EvaluationResult(
            list(range(100, 100 + len(texts))) * samples, texts * samples, scores, pixels, 7, 6, 1.0 + place, 6.0, 12.5,
            fps=5.0 if frames else None, sources=sources if edits else {},
        )  # fmt: skip
    return columns


def metrics_of(columns: Columns, trained: Sequence[str] = ()) -> dict[str, Any]:
    return metrics(Evaluation(columns, frozenset(trained), dict.fromkeys(columns, "a model")))
