"""Grids of images with captions, drawn into one PNG: pairs, base beside tuned, which are read back pair by pair for the report;
and prompts × models.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.evaluation.chosen_pairs import chosen_pairs
from flowalign.evaluation.columns import Evaluation
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.models.images import picture
from flowalign.storage.files import read_json, reading, write_atomic

GAP, LINE, WIDTH = 12, 17, 1240  # pixels between cells, of a line of text, and of a grid unless one prompt needs more
TEXT, FAINT, FRAME = "#1f2933", "#52606d", "#d9dee4"
UP, DOWN = "#0b7a3b", "#b42318"  # a score above that of the first column, and below it


@dataclass(frozen=True)
class Pair:
    """Two images as PNG files, the lines below them, and why they are shown ("" in a grid that does not say)."""

    base: bytes
    tuned: bytes
    caption: list[str]
    group: str


def pairs_grid(base: EvaluationResult, tuned: EvaluationResult, reward: str, path: Path) -> Path:
    """A grid of the pairs that gained and lost most by `reward`, and of some by chance."""
    chosen = chosen_pairs(base.scores[reward], tuned.scores[reward])
    rows = [row for group in chosen.values() for row in group]
    groups = [name for name, group in chosen.items() for _ in group]
    before, after = (result.first_frames[rows].float() / 255 for result in (base, tuned))
    return grid(before, after, captions(base, tuned, rows), path, groups)


def captions(base: EvaluationResult, tuned: EvaluationResult, rows: Sequence[int]) -> list[str]:
    """A caption for each of the pairs `rows`: the prompt, then a line `reward base → tuned` per reward."""
    return [
        "\n".join(
            [
                base.prompts[i],
                *(f"{name} {_score(base.scores[name][i])} → {_score(tuned.scores[name][i])}" for name in base.scores),
            ]
        )
        for i in rows
    ]


def _score(value: Tensor) -> str:
    return "not valid" if bool(value.isnan()) else f"{float(value):.3g}"


def grid(
    images_base: Tensor, images_tuned: Tensor, texts: Sequence[str], path: Path, groups: Sequence[str] = ()
) -> Path:
    """Draws pairs, base left and tuned right, with their captions into one PNG, and adds it to grids.json.

    images [k, 3, H, W] in [0, 1]; texts [k]: the captions, lines separated by newlines; groups [k]: why each pair is shown,
    those of a group one after the other. Tiny images are enlarged by a whole factor
    without smoothing, those above 512 pixels reduced by one. Both files are written atomically."""
    if images_base.shape != images_tuned.shape or len(images_base) != len(texts) or not texts:
        raise ValueError(
            f"grid got images {list(images_base.shape)} and {list(images_tuned.shape)} and {len(texts)} captions; "
            "expected equal shapes [k, 3, H, W] and k >= 1 captions"
        )
    lefts, rights = ([_tile(image) for image in images] for images in (images_base, images_tuned))
    width, height = lefts[0].size
    gap, line, font = GAP, LINE, _font()
    wrapped = [_wrap(text, font, 2 * width + 4) for text in texts]
    columns = max(1, min(len(texts), WIDTH // (2 * width + 4 + 2 * gap)))
    cell = (2 * width + 4 + 2 * gap, height + gap + line * (1 + max(len(lines) for lines in wrapped)) + gap)
    canvas = Image.new("RGB", (columns * cell[0], math.ceil(len(texts) / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    entries = []
    for number, (left, right, lines) in enumerate(zip(lefts, rights, wrapped, strict=True)):
        x, y = (number % columns) * cell[0] + gap, (number // columns) * cell[1] + gap
        boxes = {"base": (x, y + line, width, height), "tuned": (x + width + 4, y + line, width, height)}
        for (name, box), tile in zip(boxes.items(), (left, right), strict=True):
            label = ", ".join(filter(None, (name, groups[number] if groups and name == "base" else "")))
            draw.text((box[0], y - 1), label, fill=FAINT, font=font)
            canvas.paste(tile, box[:2])
            draw.rectangle((box[0] - 1, box[1] - 1, box[0] + width, box[1] + height), outline=FRAME)
        draw.multiline_text((x, y + line + height + 3), "\n".join(lines), fill=TEXT, font=font, spacing=3)
        group = groups[number] if groups else ""
        entries.append({"caption": texts[number], "group": group, **{name: list(box) for name, box in boxes.items()}})
    write_atomic(path, _png(canvas))
    index = path.parent / "grids.json"
    write_atomic(index, json.dumps({**read_json(index), path.name: entries}, indent=1).encode())
    return path


def columns_grid(evaluation: Evaluation, path: Path, *, each: int = 2) -> Path:
    """Draws prompts × models into one PNG: the prompts that gained and lost most by the first reward, `each` of both, and some by
    chance. The gain is the mean of the other columns' scores less the first column's. Below an image its scores, and by how much
    they are above (green) or below (red) those of the first column."""
    rows, columns = _grid_rows(evaluation, each), list(evaluation.columns.values())
    first, font = columns[0], _font()
    tiles = [[_tile(result.first_frames[row]) for result in columns] for _, row in rows]
    longest = max(font.getlength(f"{reward} −0.0001 −0.0001") for reward in evaluation.rewards)
    width, height = max(tiles[0][0].width, math.ceil(longest)), tiles[0][0].height
    block = len(columns) * (width + GAP) + GAP  # a prompt; as many beside each other as fit into WIDTH
    beside = max(1, min(len(rows), WIDTH // block))
    titles = [_wrap(_row_title(first, group, row), font, block - 2 * GAP) for group, row in rows]
    head = LINE * (1 + max(map(len, titles)))
    line = head + height + LINE * len(evaluation.rewards) + 3 * GAP
    canvas = Image.new("RGB", (beside * block, GAP + math.ceil(len(rows) / beside) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for place, ((_, row), title, pictures) in enumerate(zip(rows, titles, tiles, strict=True)):
        x, y = place % beside * block + GAP, place // beside * line + GAP
        draw.multiline_text((x, y), "\n".join(title), fill=FAINT, font=font, spacing=3)
        for name, tile, result in zip(evaluation.columns, pictures, columns, strict=True):
            draw.text((x, y + head - LINE), name, fill=TEXT, font=font)
            canvas.paste(tile, (x, y + head + 3))
            draw.rectangle((x - 1, y + head + 2, x + tile.width, y + head + 3 + height), outline=FRAME)
            _draw_scores(draw, (x, y + head + height + 6), font, result, first, row)
            x += width + GAP
    write_atomic(path, _png(canvas))
    return path


def _grid_rows(evaluation: Evaluation, each: int) -> list[tuple[str, int]]:
    """(why it is shown, number of the image), each image once."""
    base, *others = (result.scores[evaluation.rewards[0]] for result in evaluation.columns.values())
    tuned = torch.stack(others).nanmean(0) if others else base
    groups: dict[int, str] = {}
    for name, rows in chosen_pairs(base, tuned, each=each).items():
        for row in rows:
            groups.setdefault(row, name)
    return [(name, row) for row, name in groups.items()]


def _row_title(first: EvaluationResult, group: str, row: int) -> str:
    return f"{first.prompts[row]}\n{group}; seed {first.seed}, prompt {first.uids[row]}, sample {first.samples[row]}"


def _draw_scores(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], font: ImageFont.FreeTypeFont, result: EvaluationResult,
    first: EvaluationResult, row: int,
) -> None:  # fmt: skip
    """A line per reward: its score, and the signed difference to the first column's."""
    x, y = corner
    for reward, scores in result.scores.items():
        text, difference = f"{reward} {_score(scores[row])} ", float(scores[row] - first.scores[reward][row])
        draw.text((x, y), text, fill=TEXT, font=font)
        if result is not first and math.isfinite(difference):
            color = FAINT if difference == 0 else UP if difference > 0 else DOWN
            sign = "=" if difference == 0 else f"{difference:+.2g}".replace("-", "−")
            draw.text((x + font.getlength(text), y), sign, fill=color, font=font)
        y += LINE


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 13)


def _tile(image: Tensor) -> Image.Image:
    tile = picture(image)
    longer = max(tile.size)
    if longer > 512:
        return tile.reduce(math.ceil(longer / 512))
    factor = max(1, 288 // longer)
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    letters = max(8, int(width / font.getlength("n")))
    return [piece for line in caption.split("\n") for piece in textwrap.wrap(line, letters) or [""]]


def newest_pairs(folder: Path) -> list[Pair]:
    """The pairs of the newest grid (by the numbers in its name), cut out of the PNG; none without a grid. DamagedFile naming
    a file that cannot be read."""
    pictures = by_number(folder)
    if not pictures:
        return []
    with reading(pictures[-1]), Image.open(pictures[-1]) as picture:
        entries = read_json(folder / "grids.json").get(pictures[-1].name, [])
        return [
            Pair(_cut(picture, e["base"]), _cut(picture, e["tuned"]), e["caption"].split("\n"), e.get("group", ""))
            for e in entries
        ]


def by_number(folder: Path) -> list[Path]:
    """The PNGs of a folder by the numbers in their names, the newest last."""
    return sorted(folder.glob("*.png"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])


def _cut(picture: Image.Image, box: list[int]) -> bytes:
    x, y, width, height = box
    return _png(picture.crop((x, y, x + width, y + height)))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
