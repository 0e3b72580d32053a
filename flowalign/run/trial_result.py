"""What the trial of a reward found, and how that is printed and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SAMPLES = ("noise", "noise", "zero")  # of a trial: two that differ, and a black image or all-zero latents
TIMES = ("load_seconds", "ms_per_sample")  # of `Trial.record`; they differ from start to start
DIGITS = 3  # of scores that are kept: rounding on another machine is no other reward


@dataclass(frozen=True)
class Trial:
    """One reward's trial. place: where it stands in the configuration. channels: names of the columns of `scores`, which has a
    row per sample of SAMPLES, NaN for no score. load_seconds: of its `load`. ms_per_sample: of a call after the first, unless the
    first took long. memory: of its spec. fingerprint: of its class and arguments, "-" for one that has none."""

    place: str
    name: str
    channels: tuple[str, ...]
    scores: list[list[float]]
    load_seconds: float
    ms_per_sample: float
    memory: str
    fingerprint: str

    @property
    def is_flat(self) -> bool:
        """Whether in every channel several samples have a score, and all of them the same."""
        columns = [[value for value in column if value == value] for column in zip(*self.scores, strict=True)]
        return all(len(column) > 1 and len(set(column)) == 1 for column in columns)

    def record(self) -> dict[str, Any]:
        """As JSON: scores by channel, null for none."""
        columns = zip(self.channels, zip(*self.scores, strict=True), strict=True)
        return {
            "fingerprint": self.fingerprint,
            "scores": {channel: [_kept(value) for value in column] for channel, column in columns},
            "memory": self.memory,
            "load_seconds": round(self.load_seconds, 2),
            "ms_per_sample": round(self.ms_per_sample, 2),
        }


def records(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """{place: {name: record}}, for provenance.json."""
    places = dict.fromkeys(trial.place for trial in trials)
    return {place: {each.name: each.record() for each in trials if each.place == place} for place in places}


def table(trials: Sequence[Trial]) -> str:
    """A line per reward, with the scores of its first channel; then what is to be said of some."""
    rows: list[tuple[str, ...]] = [("rewards tried", "", *SAMPLES, "ms/sample", "load s", "memory", "fingerprint")]
    for trial in trials:
        others = len(trial.channels) - 1
        name = trial.name if not others else f"{trial.name}/{trial.channels[0]} (+{others})"
        scores = ["–" if math.isnan(row[0]) else f"{row[0]:.4g}" for row in trial.scores]
        times = f"{trial.ms_per_sample:.3g}", f"{trial.load_seconds:.1f}"
        rows.append((trial.place, name, *scores, *times, trial.memory, trial.fingerprint))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(_note(trial) for trial in trials if trial.is_flat)])


def _note(trial: Trial) -> str:
    return (
        f"note: {trial.place} {trial.name!r} scores all three alike: right only for one that looks for text, objects, …"
    )


def _kept(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.{DIGITS}g}")
