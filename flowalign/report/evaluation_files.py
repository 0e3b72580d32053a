"""What an evaluation leaves in its folder beside the images: metrics.json, scores.csv, the grid and the page."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

from flowalign.evaluation.columns import Evaluation, metrics
from flowalign.report.grids import columns_grid
from flowalign.storage.files import write_atomic


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes them; those of an earlier evaluation are replaced."""
    write_atomic(folder / "scores.csv", scores_csv(evaluation).encode())
    columns_grid(evaluation, folder / "grid.png")
    write_atomic(folder / "metrics.json", (json.dumps(metrics(evaluation), indent=1, allow_nan=False) + "\n").encode())


def scores_csv(evaluation: Evaluation) -> str:
    """The long table: column, uid, prompt, sample, then the rewards; an empty cell is not valid."""
    table, text = evaluation.table(), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return text.getvalue()
