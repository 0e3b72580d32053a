"""Images and clips to train on, from files: pairs of which one was preferred, and those that show their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.clips import digest_of_sample, missing, read_sample
from flowalign.data import PromptRecord, record_of
from flowalign.media import Place, place_at
from flowalign.prompt_files import read_rows, short


@dataclass(frozen=True)
class ImagePair:
    """Two images, or clips, of one prompt, of which `chosen` was preferred. place: where the file says so; record.uid: its row there."""

    place: str
    record: PromptRecord
    chosen: Place
    rejected: Place

    @property
    def files(self) -> tuple[Place, ...]:
        """Its images: chosen, rejected."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class LabeledImage:
    """An image, or clip, that shows its prompt. place: where the file says so; record.uid: its row there."""

    place: str
    record: PromptRecord
    image: Place

    @property
    def files(self) -> tuple[Place, ...]:
        """The image alone."""
        return (self.image,)


def load_pairs(file: str) -> list[ImagePair]:
    """The rows {"prompt", "chosen", "rejected"} of a .jsonl, paths from its folder, which may lead into a .zip or .tar, as the page of
    `flowalign evaluate` saves those of its blind vote: images or clips (`flowalign.clips.read_sample`). "negative_prompt" and "images", sources of an edit, are as in prompt files; all else is metadata.

    ValueError or FileNotFoundError, with file and line: for rows that lack something, for a pair of one image, and for a pair
    that stands there twice, either way round (it would count double, or against itself)."""
    pairs = [ImagePair(place, record, *files) for place, record, files in _load(file, ("chosen", "rejected"))]
    _check_once([(pair.place, (*request_of(pair.record), frozenset(pair.files))) for pair in pairs], "pair of images")
    for pair in pairs:
        if digest_of_sample(pair.chosen) == digest_of_sample(pair.rejected):
            raise ValueError(
                f"{pair.place}: got {pair.chosen} as chosen and {pair.rejected} as rejected, which are one image; expected two: "
                "leave ties out"
            )
    return pairs


def load_labeled(file: str) -> list[LabeledImage]:
    """The rows {"prompt", "image"}, or {"prompt", "video"}, of a .jsonl, paths from its folder; all else as `load_pairs` has it. An image
    may show several prompts."""
    found = [LabeledImage(place, record, *files) for place, record, files in _load(file, ("image",))]
    _check_once([(each.place, (*request_of(each.record), each.image)) for each in found], "image of this prompt")
    return found


def request_of(record: PromptRecord) -> tuple[object, ...]:
    """What an image of the prompt is made from: equal for two records that ask for the same image."""
    return (record.prompt, record.images)


def check_images_of(rows: Sequence[ImagePair | LabeledImage], height: int, width: int, frames: int = 1) -> None:
    """ValueError, with file and line, for an image or clip that cannot be read, or has another size or number of frames. Each is decoded
    once; none is resized or cut: how would be a choice, and the policy would learn its traces."""
    places: dict[Place, str] = {}
    for row in rows:
        for file in row.files:
            places.setdefault(file, row.place)
    for file, place in places.items():
        try:
            sample = read_sample(file)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found = len(sample) if sample.ndim == 4 else 1
        if found != frames:
            raise ValueError(
                f"{place}: got {file}, {_kind(found)}; expected {_kind(frames)}, as policy.frames says: replace the files, or change it"
            )
        if tuple(sample.shape[-2:]) != (height, width):
            raise ValueError(
                f"{place}: got {file} of {sample.shape[-2]}×{sample.shape[-1]} pixels; expected {height}×{width}, the policy's height × "
                "width: resize the files, or change policy.height and policy.width"
            )


def _kind(frames: int) -> str:
    return "an image" if frames == 1 else f"a clip of {frames} frames"


def check_not_held_out(rows: Sequence[ImagePair | LabeledImage], held_out: Sequence[PromptRecord]) -> None:
    """ValueError, with file and line, for a prompt that is among those that are evaluated."""
    evaluated = set(map(request_of, held_out))
    for row in rows:
        if request_of(row.record) in evaluated:
            raise ValueError(
                f"{row.place}: got the prompt {short(row.record.prompt)}, which is among those of evaluation.prompts; expected other "
                "ones, or the gain would not be that of new prompts: evaluate others, or set "
                "evaluation.allow_training_prompts=true"
            )


def digest_of(rows: Sequence[ImagePair | LabeledImage]) -> str:
    """SHA-256 of prompts, and of the content of images wherever they lie: by it a resumed run checks that its data are the same."""
    content = [
        (
            row.record.prompt,
            row.record.negative_prompt,
            [*map(digest_of_sample, row.files), *(image.digest() for image in row.record.images)],
        )
        for row in rows
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _load(file: str, keys: tuple[str, ...]) -> list[tuple[str, PromptRecord, list[Place]]]:
    """(place, prompt, the images or clips under `keys`) of each row."""
    source = Path(file).expanduser()
    if source.suffix != ".jsonl":
        raise ValueError(f"got the file of images {file!r}; expected a .jsonl, with a JSON object a line")
    rows = read_rows(source)
    if not rows:
        raise ValueError(f"{source} holds no rows; expected at least one")
    return [_row(place, uid, row, source.parent, keys) for uid, (place, row) in enumerate(rows)]


def _row(
    place: str, uid: int, row: dict[str, Any], folder: Path, keys: tuple[str, ...]
) -> tuple[str, PromptRecord, list[Place]]:
    if keys == ("image",) and "video" in row and "image" not in row:
        keys = ("video",)
    files = [_file(place, row.get(key), key, folder) for key in keys]
    rest = {key: value for key, value in row.items() if key not in keys}
    if other := next((key for key in ("image", "video") if key in rest), None):
        raise ValueError(f"{place}: got {other!r} beside {keys[0]!r}; expected the sources of an edit under 'images'")
    return place, record_of(place, uid, rest, folder), files


def _file(place: str, name: Any, key: str, folder: Path) -> Place:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"{place}: got {short(name)} under {key!r}; expected the path of an image or clip, from the folder of this file"
        )
    file = place_at(folder / name)
    if lacks := missing(file):
        raise FileNotFoundError(
            f"{place}: the {key} image {file} {lacks} (working directory: {Path.cwd()}); expected an image file, a clip or a "
            "folder of its frames, the path from the folder of this file"
        )
    return file


def _check_once(rows: Sequence[tuple[str, object]], what: str) -> None:
    first: dict[object, str] = {}
    for place, content in rows:
        if content in first:
            raise ValueError(
                f"{place}: got the {what} of {first[content].rpartition(', ')[2]} again; expected each once: leave one of them out"
            )
        first[content] = place
