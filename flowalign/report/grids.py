"""Grids of images with captions, drawn into one PNG: pairs, base beside tuned, which are read back pair by pair for the report;
and prompts × models. The source of an edit stands before them. A video is a strip of FRAMES of its frames, and moves in the page.
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
from flowalign.models.images import as_bytes, picture
from flowalign.report.picture_urls import clip
from flowalign.storage.files import read_json, reading, write_atomic

GAP, LINE, WIDTH = 12, 17, 1240  # pixels between cells, of a line of text, and of a grid unless one prompt needs more
FRAMES = 4  # of a video, evenly spread, the first and the last among them
SEAM = 4  # pixels between the images of a pair, half of it between frames
KINDS = {"image/webp": ".webp", "video/mp4": ".mp4"}  # of clips
TEXT, FAINT, FRAME = "#1f2933", "#52606d", "#d9dee4"
UP, DOWN = "#0b7a3b", "#b42318"  # a score above that of the first column, and below it


@dataclass(frozen=True)
class Pair:
    """images: "source" of an edit, "base" and "tuned" as PNG files, of videos the first frames; clips: of videos (MIME type, file) by the
    same names; the lines below them; why they are shown ("" in a grid that does not say)."""

    images: dict[str, bytes]
    clips: dict[str, tuple[str, bytes]]
    caption: list[str]
    group: str


def pairs_grid(base: EvaluationResult, tuned: EvaluationResult, reward: str, path: Path) -> Path:
    """A grid of the pairs that gained and lost most by `reward`, and of some by chance."""
    chosen = chosen_pairs(base.scores[reward], tuned.scores[reward])
    rows = [row for group in chosen.values() for row in group]
    groups = [name for name, group in chosen.items() for _ in group]
    sources = [base.sources[base.uids[row]] for row in rows if base.sources]
    return grid(
        base.pixels[rows], tuned.pixels[rows], captions(base, tuned, rows), path, groups, sources=sources,
        fps=base.fps or 8.0,
    )  # fmt: skip


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
    images_base: Tensor, images_tuned: Tensor, texts: Sequence[str], path: Path, groups: Sequence[str] = (), *,
    sources: Sequence[Tensor] = (), fps: float = 8.0,
) -> Path:  # fmt: skip
    """Draws pairs, base left and tuned right, with their captions into one PNG, and adds it to grids.json.

    images [k, 3, H, W], uint8 or in [0, 1], or videos [k, F, 3, H, W] of `fps` frames per second, whose clips are written beside; texts
    [k]: the captions, lines separated by newlines; groups [k]: why each pair is shown, those of a group one after the other;
    sources [k]: of an edit, [3, H, w] each, left of the pair. Tiny images are enlarged by a whole factor without smoothing, those
    above 512 pixels (the frames of a video 256) reduced by one. Files are written atomically."""
    if images_base.shape != images_tuned.shape or len(images_base) != len(texts) or not texts:
        raise ValueError(
            f"grid got images {list(images_base.shape)} and {list(images_tuned.shape)} and {len(texts)} captions; "
            "expected equal shapes [k, 3, H, W] and k >= 1 captions"
        )
    shown: dict[str, Sequence[Tensor] | Tensor] = {"source": sources, "base": images_base, "tuned": images_tuned}
    tiles = {name: [_tile(image, images_base[0]) for image in shown[name]] for name in shown if len(shown[name])}
    widths, height = [max(tile.width for tile in each) for each in tiles.values()], tiles["base"][0].height
    frame = _scaled(_frames(images_base[0])[0], images_base[0]).width
    width = sum(widths) + SEAM * (len(widths) - 1)
    gap, line, font = GAP, LINE, _font()
    wrapped = [_wrap(text, font, width) for text in texts]
    columns = max(1, min(len(texts), WIDTH // (width + 2 * gap)))
    cell = (width + 2 * gap, height + gap + line * (1 + max(len(lines) for lines in wrapped)) + gap)
    canvas = Image.new("RGB", (columns * cell[0], math.ceil(len(texts) / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    entries = []
    for number, lines in enumerate(wrapped):
        x, y = (number % columns) * cell[0] + gap, (number // columns) * cell[1] + gap
        draw.multiline_text((x, y + line + height + 3), "\n".join(lines), fill=TEXT, font=font, spacing=3)
        group, boxes = groups[number] if groups else "", {}
        for (name, each), across in zip(tiles.items(), widths, strict=True):
            tile, label = each[number], ", ".join(filter(None, (name, group if name == "base" else "")))
            draw.text((x, y - 1), label, fill=FAINT, font=font)
            canvas.paste(tile, (x, y + line))
            draw.rectangle((x - 1, y + line - 1, x + tile.width, y + line + height), outline=FRAME)
            boxes[name] = [x, y + line, tile.width if name == "source" else frame, height]
            x += across + SEAM
        videos = {"base": images_base[number], "tuned": images_tuned[number]} if images_base.ndim == 5 else {}
        clips = {name: _write_clip(path, f"{number}-{name}", video, fps) for name, video in videos.items()}
        entries.append({"caption": texts[number], "group": group, **boxes, **({"clips": clips} if clips else {})})
    write_atomic(path, _png(canvas))
    index = path.parent / "grids.json"
    write_atomic(index, json.dumps({**read_json(index), path.name: entries}, indent=1).encode())
    return path


def columns_grid(evaluation: Evaluation, path: Path, *, each: int = 2) -> Path:
    """Draws prompts × models into one PNG: the prompts that gained and lost most by the first reward, `each` of both, and some by
    chance. The gain is the mean of the other columns' scores less the first column's. Below an image its scores, and by how much
    they are above (green) or below (red) those of the first column. The source of an edit stands left of them."""
    rows, columns = _grid_rows(evaluation, each), list(evaluation.columns.values())
    first, font = columns[0], _font()
    tiles = [[_tile(result.pixels[row], first.pixels[0]) for result in columns] for _, row in rows]
    sources = [_tile(first.sources[first.uids[row]], first.pixels[0]) for _, row in rows if first.sources]
    longest = max(font.getlength(f"{reward} −0.0001 −0.0001") for reward in evaluation.rewards)
    width, height = max(tiles[0][0].width, math.ceil(longest)), tiles[0][0].height
    left = max(source.width for source in sources) + GAP if sources else 0
    block = left + len(columns) * (width + GAP) + GAP  # a prompt; as many beside each other as fit into WIDTH
    beside = max(1, min(len(rows), WIDTH // block))
    titles = [_wrap(_row_title(first, group, row), font, block - 2 * GAP) for group, row in rows]
    head = LINE * (1 + max(map(len, titles)))
    line = head + height + LINE * len(evaluation.rewards) + 3 * GAP
    canvas = Image.new("RGB", (beside * block, GAP + math.ceil(len(rows) / beside) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for place, ((_, row), title, pictures) in enumerate(zip(rows, titles, tiles, strict=True)):
        x, y = place % beside * block + GAP, place // beside * line + GAP
        draw.multiline_text((x, y), "\n".join(title), fill=FAINT, font=font, spacing=3)
        if sources:
            _paste(canvas, draw, (x, y + head), font, "source", sources[place])
            x += left
        for name, tile, result in zip(evaluation.columns, pictures, columns, strict=True):
            _paste(canvas, draw, (x, y + head), font, name, tile)
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


def _paste(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], font: ImageFont.FreeTypeFont, name: str,
    tile: Image.Image,
) -> None:  # fmt: skip
    """Below its name, in a frame."""
    x, y = corner
    draw.text((x, y - LINE), name, fill=TEXT, font=font)
    canvas.paste(tile, (x, y + 3))
    draw.rectangle((x - 1, y + 2, x + tile.width, y + 3 + tile.height), outline=FRAME)


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


def _tile(image: Tensor, like: Tensor) -> Image.Image:
    """An image, or the strip of a video, at the scale of `like`, an image [3, H, W] or a video [F, 3, H, W]."""
    frames = [_scaled(frame, like) for frame in _frames(image)]
    width = frames[0].width + SEAM // 2
    strip = Image.new("RGB", (len(frames) * width - SEAM // 2, frames[0].height), "white")
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * width, 0))
    return strip


def _frames(image: Tensor) -> Tensor:
    """[n, 3, H, W]: the image, or at most FRAMES frames of the video."""
    if image.ndim == 3:
        return image[None]
    return image[torch.linspace(0, len(image) - 1, min(len(image), FRAMES)).round().long()]


def _scaled(image: Tensor, like: Tensor) -> Image.Image:
    """A small one enlarged by a whole factor without smoothing, a large one reduced by one; frames are half as large as images."""
    shown, longer, share = picture(image), max(like.shape[-2:]), like.ndim - 2
    if longer > 512 // share:
        return shown.reduce(math.ceil(longer * share / 512))
    factor = max(1, 288 // share // longer)
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def _write_clip(path: Path, mark: str, video: Tensor, fps: float) -> str:
    """The name of its file, beside the grid of that path."""
    kind, content = clip(as_bytes(video), fps)
    name = f"{path.stem}-{mark}{KINDS[kind]}"
    write_atomic(path.parent / name, content)
    return name


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
        return [
            Pair(
                {name: _cut(picture, entry[name]) for name in ("source", "base", "tuned") if name in entry},
                {name: _read_clip(folder / file) for name, file in entry.get("clips", {}).items()},
                entry["caption"].split("\n"), entry.get("group", ""),
            )
            for entry in read_json(folder / "grids.json").get(pictures[-1].name, [])
        ]  # fmt: skip


def by_number(folder: Path) -> list[Path]:
    """The PNGs of a folder by the numbers in their names, the newest last."""
    return sorted(folder.glob("*.png"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])


def _read_clip(path: Path) -> tuple[str, bytes]:
    with reading(path):
        return next(kind for kind, suffix in KINDS.items() if suffix == path.suffix), path.read_bytes()


def _cut(picture: Image.Image, box: list[int]) -> bytes:
    x, y, width, height = box
    return _png(picture.crop((x, y, x + width, y + height)))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
