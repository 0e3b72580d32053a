"""What makes a run's figures doubtful, in a sentence each: said in the run's last line and in its report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.storage.metrics_log import Row


def doubts(gains: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """gains: the table of summary.json, {} if the run was not evaluated. rows: of metrics.jsonl."""
    return [*_dropped(gains), *_constant(rows)]


def _dropped(gains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rewards that could not score all images: the pairs that are left are no fair sample."""
    return [
        f"{name} dropped {dropped} of {gains['pairs'][name] + dropped} pairs, which it could not score (base "
        f"{gains['unscored_base'][name]}, tuned {gains['unscored_tuned'][name]}): its gain is that of the rest"
        for name, dropped in gains.get("dropped", {}).items()
        if dropped
    ]


def _constant(rows: Sequence[Row]) -> list[str]:
    """A training reward from which nothing could be learned: one score for all images of an iteration, in every iteration, or
    for all of a group."""
    trained = [row for row in rows if "reward/mean" in row]
    names = dict.fromkeys(key for row in trained for key in row if re.fullmatch(r"reward/.+_std", key))
    times = f"in all {len(trained)} iterations" if len(trained) > 1 else "in the only iteration"
    constant = [
        key[len("reward/") : -len("_std")]
        for key in names
        if all(_equal(row.get(key), row.get(key.replace("_std", "_mean"))) for row in trained)
    ]
    if constant:
        return [
            f"the training reward {', '.join(constant)} gave all images the same score {times}: nothing was learned from it"
        ]
    if trained and all(row.get("group/zero_std_ratio") == 1 for row in trained):
        return [f"the training reward told no images of a prompt apart {times}: nothing was learned from it"]
    return []


def _equal(spread: float | None, mean: float | None) -> bool:
    """Whether a standard deviation is 0 up to the rounding of the mean."""
    return spread is not None and mean is not None and spread <= 1e-9 * abs(mean)
