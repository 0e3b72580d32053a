"""The grid of prompts × models: which prompts, whose images, and the signs of the differences."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowalign.evaluation.columns import Evaluation
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.report.grids import DOWN, GAP, UP, columns_grid, newest_pairs, pairs_grid
from tests.helpers.evaluation_columns import made_up


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


def test_a_video_is_a_strip_of_its_frames_and_the_source_stands_before(tmp_path: Path) -> None:
    shades = torch.arange(0, 250, 25, dtype=torch.uint8)[None, :, None, None, None].expand(4, 10, 3, 32, 32)
    plain = result([0.5] * 4, 0)
    sources = {uid: torch.full((3, 32, 64), 7, dtype=torch.uint8) for uid in plain.uids}
    clips = replace(plain, pixels=shades, sources=sources)
    _, pixels = colors(columns_grid(Evaluation({"base": clips, "tuned": clips}), tmp_path / "strips.png"))
    row, left = pixels[100, :, 0], GAP + 2 * 128 + GAP  # 32 pixels are enlarged four times
    assert set(row[GAP : GAP + 2 * 128]) == {7}
    for place, shade in enumerate((0, 75, 150, 225)):  # the frames 0, 3, 6 and 9
        assert set(row[left + 130 * place : left + 130 * place + 128]) == {shade}
        assert row[left + 130 * place + 128] in (255, 217)  # a seam, or the frame


def test_pairs_of_clips_are_read_back_with_their_files(tmp_path: Path) -> None:
    columns = made_up(prompts=3, frames=5, edits=True)
    pairs_grid(*columns.values(), "ocr", tmp_path / "held_out.png")
    pairs = newest_pairs(tmp_path)
    for pair in pairs:
        place = columns["base"].prompts.index(pair.caption[0])
        assert list(pair.images) == ["source", "base", "tuned"]
        with Image.open(io.BytesIO(pair.images["tuned"])) as still:
            assert still.size == (6 * 24, 6 * 12)  # of the first frame
            first = columns["tuned"].pixels[place, 0].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(np.array(still)[3::6, 3::6], first)
        kind, content = pair.clips["base"]
        with Image.open(io.BytesIO(content)) as clip:
            assert kind == "image/webp" and clip.n_frames == 5 and clip.size == (24, 12)  # type: ignore[attr-defined]
    assert len({file.name for file in tmp_path.glob("held_out-*.webp")}) == 2 * len(pairs) > 2
