"""metrics.jsonl: one JSON object a line, appended as the run goes, cut back to the checkpoint when it resumes.

A row holds `step`, metrics under `group/name`, and what depends on the clock under `time/…`. Two equal runs have equal rows
except for `time/`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from flowalign.storage.files import DamagedFile, append_line, reading, write_atomic

Row = dict[str, Any]


@dataclass(frozen=True)
class MetricsLog:
    """The metrics file of a run. One process writes it."""

    path: Path

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row and waits for the disk. `time/wall` (seconds since 1970) is added.

        JSON has no NaN or infinity: both are kept as null. Raises ValueError for a name that is not `group/name`,
        TypeError for a value that is not a number."""
        row: Row = {"step": step, **{name: _number(name, value) for name, value in values.items()}}
        append_line(self.path, json.dumps({**row, "time/wall": round(time.time(), 3)}, allow_nan=False))

    def cut_back(self, step: int) -> None:
        """Keeps the rows up to and including `step`, drops later ones and a torn last line; atomic."""
        if not self.path.exists():
            return
        kept = "".join(json.dumps(row) + "\n" for row in read_rows(self.path) if row["step"] <= step)
        if kept.encode() != self.path.read_bytes():
            write_atomic(self.path, kept.encode())

    def rows(self) -> list[Row]:
        """All complete rows; none if nothing was logged yet."""
        return read_rows(self.path) if self.path.exists() else []


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file. A last line without newline is a torn write and is left out.

    Raises DamagedFile that names the file, and the line for anything else that is not a JSON object with an integer `step`."""
    rows = []
    with reading(path):
        content = path.read_bytes()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DamagedFile(
                f"{path}, line {number}: not JSON ({error}); remove the line or restore the file"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DamagedFile(
                f"{path}, line {number}: expected a JSON object with an integer 'step', got {line[:80]!r}"
            )
        rows.append(row)
    return rows


def without_time(row: Row) -> Row:
    """The row without its wall-clock fields: equal bit for bit in equal runs."""
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def _number(name: str, value: float) -> float | None:
    group, _, rest = name.partition("/")
    if not group or not rest:
        raise ValueError(f"got metric {name!r}; expected a name like 'group/name', such as 'reward/mean'")
    if not isinstance(value, Real):
        raise TypeError(f"metric {name!r}: got a {type(value).__name__}; expected a number: call .item() on a tensor")
    if isinstance(value, int):  # bool too: json writes it as true or false
        return value
    return float(value) if math.isfinite(value) else None
