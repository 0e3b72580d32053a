"""The grid of prompts × models: which prompts, whose images, and the signs of the differences."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowalign.evaluation.columns import Evaluation
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.report.grids import DOWN, GAP, UP, columns_grid


def result(scores: list[float], level: int) -> EvaluationResult:
    pixels = torch.full((len(scores), 3, 32, 32), level, dtype=torch.uint8)
    uids = list(range(len(scores)))
    return EvaluationResult(
        uids, [f"prompt {uid}" for uid in uids], {"bright": torch.tensor(scores).double()}, pixels, 0, 4, 1.0, 4.0, 1.0
    )


def colors(path: Path) -> tuple[set[str], np.ndarray]:
    with Image.open(path) as picture:
        pixels = np.array(picture)
    found = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels.reshape(-1, 3), axis=0)}
    return found, pixels


def test_images_stand_side_by_side_and_differences_have_a_sign(tmp_path: Path) -> None:
    base = result([0.5] * 4, 10)
    found, pixels = colors(columns_grid(Evaluation({"base": base, "up": result([0.9] * 4, 200)}), tmp_path / "up.png"))
    assert UP in found and DOWN not in found
    row = pixels[150]
    assert set(row[GAP : GAP + 288].flatten()) == {10} and 200 in row[GAP + 288 :]  # enlarged nine times
    found, _ = colors(columns_grid(Evaluation({"base": base, "down": result([0.1] * 4, 90)}), tmp_path / "down.png"))
    assert DOWN in found and UP not in found
    found, _ = colors(columns_grid(Evaluation({"base": base, "same": base}), tmp_path / "same.png"))
    assert not {UP, DOWN} & found


def test_a_model_alone_and_images_without_a_score_are_drawn(tmp_path: Path) -> None:
    alone = columns_grid(Evaluation({"a": result([0.1, torch.nan], 50)}), tmp_path / "alone.png")
    found, _ = colors(alone)
    assert "#323232" in found and not {UP, DOWN} & found
    none = Evaluation({"a": result([torch.nan], 50), "b": result([0.3], 50)})
    assert columns_grid(none, tmp_path / "none.png").exists()
