"""What training gained: base and tuned model compared pair by pair, on the same prompts and from the same noise.

Most of the spread between prompts cancels in the difference of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flowalign.evaluation.evaluate import EvaluationResult
from samplers import generator


@dataclass(frozen=True)
class Gain:
    """tuned − base: `base`, `tuned` and `mean` (their difference) over the valid pairs, a 95 % interval low … high.

    The interval is None with fewer than two prompts. `pairs` were compared, `dropped` had an invalid score."""

    mean: float
    interval: tuple[float, float] | None
    base: float
    tuned: float
    pairs: int
    dropped: int


def paired_gain(
    base: Tensor, tuned: Tensor, clusters: Sequence[int] | None = None, *, seed: int = 0, resamples: int = 10_000
) -> Gain:
    """The mean of tuned − base [N] and its 95 % percentile-bootstrap interval (Efron 1979).

    What is drawn with replacement are clusters (prompt uids), not samples: several seeds of one prompt are not
    independent. Without `clusters` each sample is its own. A pair with a nan on either side is dropped and counted.
    Below about 20 clusters the interval is too narrow. The draws are keyed: the same scores give the same interval."""
    if base.shape != tuned.shape or base.ndim != 1:
        raise ValueError(f"scores of shapes {list(base.shape)} and {list(tuned.shape)}; expected two [N] of equal N")
    labels = np.arange(len(base)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(base):
        raise ValueError(f"{len(labels)} cluster labels for {len(base)} scores; expected one each")
    before, after = base.double().numpy(), tuned.double().numpy()
    valid = ~(np.isnan(before) | np.isnan(after))
    if not valid.any():
        raise ValueError(
            f"none of {len(base)} pairs has two valid scores: there is nothing to compare; check the reward"
        )
    before, after, labels = before[valid], after[valid], labels[valid]
    _, codes = np.unique(labels, return_inverse=True)
    draws = _bootstrap_means(np.bincount(codes, after - before), np.bincount(codes), seed, resamples)
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    mean_before, mean_after = float(before.mean()), float(after.mean())
    return Gain(
        mean=mean_after - mean_before,
        interval=(low, high) if codes.max() > 0 else None,
        base=mean_before,
        tuned=mean_after,
        pairs=len(before),
        dropped=int((~valid).sum()),
    )


def _bootstrap_means(sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws of as many clusters as there are; sums and counts [C] per cluster."""
    rng = generator(seed, "select", "paired_gain")
    clusters = len(sums)
    means = []
    for first in range(0, resamples, 500):  # in pieces: a piece holds 500·C numbers
        times = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(500, resamples - first))
        means.append(times @ sums / (times @ counts))
    return np.concatenate(means)


def compare(base: EvaluationResult, tuned: EvaluationResult) -> dict[str, Gain]:
    """The gain per reward. Raises ValueError unless both saw the same prompts, samples, seed and rewards."""
    for what, here, there in (
        ("prompts", base.uids, tuned.uids),
        ("seed", base.seed, tuned.seed),
        ("rewards", sorted(base.scores), sorted(tuned.scores)),
    ):
        if here != there:
            raise ValueError(f"base and tuned differ in {what} ({here} and {there}): evaluate both alike to pair them")
    return {name: paired_gain(base.scores[name], tuned.scores[name], base.uids) for name in base.scores}


def summary(gains: dict[str, Gain]) -> dict[str, dict[str, Any]]:
    """The gains as JSON for summary.json: {base, tuned, gain, gain_ci95, pairs, dropped}, each {reward: value}."""
    return {
        "base": {name: gain.base for name, gain in gains.items()},
        "tuned": {name: gain.tuned for name, gain in gains.items()},
        "gain": {name: gain.mean for name, gain in gains.items()},
        "gain_ci95": {name: list(gain.interval) if gain.interval else None for name, gain in gains.items()},
        "pairs": {name: gain.pairs for name, gain in gains.items()},
        "dropped": {name: gain.dropped for name, gain in gains.items()},
    }


def captions(base: EvaluationResult, tuned: EvaluationResult) -> list[str]:
    """A caption for each kept image pair: the prompt, then a line `reward base → tuned` per reward."""
    return [
        "\n".join(
            [
                prompt,
                *(f"{name} {_text(base.scores[name][i])} → {_text(tuned.scores[name][i])}" for name in base.scores),
            ]
        )
        for i, prompt in enumerate(base.prompts[: len(base.images)])
    ]


def _text(value: Tensor) -> str:
    return "not valid" if bool(value.isnan()) else f"{float(value):.3g}"
