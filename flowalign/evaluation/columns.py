"""Several models measured on the same prompts and seeds: their results side by side, and the figures that compare them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.evaluation.appearance import Appearance, diversity
from flowalign.evaluation.evaluate import EvaluationResult, as_frame
from flowalign.evaluation.paired_gain import paired_gain

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Models side by side, on the same prompts, samples, seed and rewards; ValueError if they differ.

    columns: the first is what the others are compared with. trained: labels of the rewards that a column was trained on; the
    others are held out. sources: which place each column is, where one was named. appearances: how the images look in full
    resolution; of a column without one it is measured on the pixels that its result keeps."""

    columns: dict[str, EvaluationResult]
    trained: frozenset[str] = frozenset()
    sources: dict[str, str] = field(default_factory=dict)
    appearances: dict[str, Appearance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("got an evaluation without columns; expected at least one model")
        for what in ("uids", "prompts", "digest", "seed", "scores"):
            found = {name: list(_read(result, what)) for name, result in self.columns.items()}
            first, *others = found
            if differing := [name for name in others if found[name] != found[first]]:
                raise ValueError(
                    f"the columns {first} and {differing[0]} differ in {what}; expected the same prompts, samples, seed and rewards: "
                    "evaluate them alike"
                )
        if unknown := self.trained - set(self.rewards):
            raise ValueError(f"got trained={sorted(unknown)}; expected labels of the rewards {self.rewards}")

    @property
    def baseline(self) -> str:
        """The first column."""
        return next(iter(self.columns))

    @property
    def rewards(self) -> list[str]:
        """The labels, in the order of the first column."""
        return list(self.columns[self.baseline].scores)

    def appearance(self, column: str) -> Appearance:
        """How its images look."""
        return self.appearances.get(column) or Appearance.of(self.columns[column].pixels)

    def table(self) -> dict[str, list[Any]]:
        """A row per image and column: column, uid, prompt, sample and a float per reward, nan = not valid."""
        rows: dict[str, list[Any]] = {key: [] for key in ("column", "uid", "prompt", "sample", *self.rewards)}
        for column, result in self.columns.items():
            rows["column"] += [column] * len(result.uids)
            for key, values in (("uid", result.uids), ("prompt", result.prompts), ("sample", result.samples)):
                rows[key] += values
            for reward in self.rewards:
                rows[reward] += result.scores[reward].tolist()
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """`table` as a frame. ImportError without pandas, which flowalign does not install."""
        return as_frame(self.table())


def _read(result: EvaluationResult, what: str) -> list[Any]:
    value = vars(result)[what]
    return sorted(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else [value]


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    """metrics.json. Means are over valid images, intervals 95 % of a bootstrap over prompts (see `paired_gain`), gains paired
    with the first column. win_rate: (wins + ties / 2) / pairs. None: not one valid score or pair; of an interval also a single
    prompt."""
    first, *others = evaluation.columns
    base, rewards = evaluation.columns[first], evaluation.rewards
    means = {
        column: {reward: _mean(result.scores[reward], result.uids) for reward in rewards}
        for column, result in evaluation.columns.items()
    }
    looks = {column: evaluation.appearance(column) for column in evaluation.columns}
    return {
        "baseline": first,
        "columns": list(evaluation.columns),
        "rewards": rewards,
        "trained": [reward for reward in rewards if reward in evaluation.trained],
        "prompts": len(set(base.uids)),
        "samples_per_prompt": len(base.uids) // len(set(base.uids)),
        "seed": base.seed,
        "settings": {column: _settings(evaluation, column) for column in evaluation.columns},
        "mean": {column: {reward: each[0] for reward, each in row.items()} for column, row in means.items()},
        "interval": {column: {reward: each[1] for reward, each in row.items()} for column, row in means.items()},
        "gain": {column: _gains(base, evaluation.columns[column], rewards) for column in others},
        "diversity": {column: diversity(look, base.uids, base.samples) for column, look in looks.items()},
        "monitors": {
            column: {name: _number(float(values.nanmean())) for name, values in look.monitors.items()}
            for column, look in looks.items()
        },
    }


def _settings(evaluation: Evaluation, column: str) -> dict[str, Any]:
    result = evaluation.columns[column]
    return {
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "evaluations_per_image": result.evaluations_per_image,
        "seconds": _number(result.seconds),
        "source": evaluation.sources.get(column, column),
    }


def _mean(scores: Tensor, uids: list[int]) -> tuple[float | None, list[float] | None]:
    """And its interval: both are those of a gain over 0."""
    if not bool(scores.isfinite().any()):
        return None, None
    gain = paired_gain(torch.zeros_like(scores), scores, uids)
    return gain.mean, list(gain.interval) if gain.interval else None


def _gains(base: EvaluationResult, tuned: EvaluationResult, rewards: list[str]) -> dict[str, dict[str, Any]]:
    return {reward: _gain(base.scores[reward], tuned.scores[reward], base.uids) for reward in rewards}


def _gain(base: Tensor, tuned: Tensor, uids: list[int]) -> dict[str, Any]:
    if not bool((base.isfinite() & tuned.isfinite()).any()):
        counts = dict.fromkeys(("wins", "losses", "ties", "pairs"), 0)
        return {"gain": None, "ci95": None, "win_rate": None, **counts, "dropped": len(base)}
    gain = paired_gain(base, tuned, uids)
    return {
        "gain": gain.mean,
        "ci95": list(gain.interval) if gain.interval else None,
        "win_rate": (gain.wins + gain.ties / 2) / gain.pairs,
        "wins": gain.wins,
        "losses": gain.losses,
        "ties": gain.ties,
        "pairs": gain.pairs,
        "dropped": gain.dropped,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
