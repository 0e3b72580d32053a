"""What an evaluation leaves in its folder beside the images: metrics.json, scores.csv, the grid and the page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowalign.evaluation.columns import Evaluation, metrics
from flowalign.report.evaluation_page import evaluation_page
from flowalign.report.grids import columns_grid
from flowalign.storage.files import write_atomic
from flowalign.storage.metrics_log import Row


def write_evaluation(evaluation: Evaluation, folder: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Writes them; those of an earlier evaluation are replaced. runs: rows of metrics.jsonl by column, of columns that are runs."""
    figures = metrics(evaluation)
    write_atomic(folder / "scores.csv", scores_csv(evaluation).encode())
    columns_grid(evaluation, folder / "grid.png")
    write_atomic(folder / "metrics.json", (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())
    fps = next(iter(evaluation.columns.values())).fps
    page = evaluation_page(evaluation.columns, figures, title=", ".join(evaluation.columns), runs=runs, fps=fps or 8.0)
    write_atomic(folder / "report.html", page.encode())


def scores_csv(evaluation: Evaluation) -> str:
    """The long table: column, uid, prompt, sample, then the rewards; an empty cell is not valid."""
    table, text = evaluation.table(), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return text.getvalue()
