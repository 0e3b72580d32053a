"""Columns of an evaluation made up without a model, and their metrics.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.paired_gain import paired_gains

Columns = dict[str, EvaluationResult]


def made_up(
    names: Sequence[str] = ("base", "tuned"), prompts: Sequence[str] | int = 30, rewards: Sequence[str] = ("ocr", "jpeg"),
    size: tuple[int, int] = (12, 24), frames: int = 0, samples: int = 1,
) -> Columns:  # fmt: skip
    """Later columns score higher by the first reward and lower by the others; one score of the last column is nan."""
    generator = torch.Generator().manual_seed(0)
    texts = [f"the word {n} in red" for n in range(prompts)] if isinstance(prompts, int) else list(prompts)
    count = len(texts) * samples
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
            list(range(100, 100 + len(texts))) * samples, texts * samples, scores, pixels, 7, 6, 1.0 + place, 6.0, 12.5
        )
    return columns


def metrics_of(columns: Mapping[str, EvaluationResult], trained: Sequence[str] = ()) -> dict[str, Any]:
    base, *others = columns
    first = columns[base]
    return {
        "baseline": base, "columns": list(columns), "rewards": list(first.scores), "trained": list(trained),
        "prompts": len(set(first.uids)), "samples_per_prompt": len(first.uids) // len(set(first.uids)), "seed": first.seed,
        "settings": {
            name: {
                "num_inference_steps": each.num_inference_steps, "guidance_scale": each.guidance_scale,
                "evaluations_per_image": each.evaluations_per_image, "seconds": each.seconds, "source": "a model",
            }
            for name, each in columns.items()
        },
        "mean": {name: {reward: _mean(s) for reward, s in each.scores.items()} for name, each in columns.items()},
        "interval": {name: {reward: [0.1, 0.9] for reward in each.scores} for name, each in columns.items()},
        "gain": {name: _gains(first, columns[name]) for name in others},
        "diversity": {name: {"pixels": 0.25 + place} for place, name in enumerate(columns)},
        "monitors": {name: {"saturation": 0.5 - place, "contrast": None} for place, name in enumerate(columns)},
    }  # fmt: skip


def _mean(scores: torch.Tensor) -> float | None:
    return None if scores.isnan().all() else float(scores.nanmean())


def _gains(base: EvaluationResult, other: EvaluationResult) -> dict[str, Any]:
    return {
        name: {
            "gain": gain.mean, "ci95": list(gain.interval) if gain.interval else None, "pairs": gain.pairs,
            "win_rate": (gain.wins + gain.ties / 2) / gain.pairs, "wins": gain.wins, "losses": gain.losses,
            "ties": gain.ties, "dropped": gain.dropped,
        }
        for name, gain in paired_gains(base, other).items()
    }  # fmt: skip
