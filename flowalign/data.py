"""Prompt sets: where prompts come from, and what they say."""

from __future__ import annotations

import hashlib
import importlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowalign.media import Size, SourceImage, read_image, source_image
from flowalign.prompt_files import SUFFIXES, Row, read_rows, short
from flowalign.prompt_sets import PLAIN, PROMPT_SETS, PromptSet, our_rows


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. uid: its row in the set (two rows of equal text are two prompts). metadata: for rewards.

    images: the source images of an edit, none for text to image; a path, such as `cat.png` or `photos.zip/cat.png`, or a picture of
    Pillow becomes a SourceImage. negative_prompt: what guidance starts from; None means the policy's own. size: of what is generated from
    it in training (`flowalign.buckets`); None means the policy's. TypeError for an image that is
    none of these."""

    uid: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)
    images: tuple[SourceImage, ...] = ()
    negative_prompt: str | None = None
    size: Size | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(source_image(image) for image in self.images))


Source = SourceImage | Image.Image | str | Path
Sources = Source | Sequence[Source | Sequence[Source]]


def as_records(
    prompts: str | PromptRecord | Sequence[str | PromptRecord], images: Sources | None = None
) -> list[PromptRecord]:
    """A text or several as a prompt set, the place of each its uid; records stay as they are. TypeError for anything else.

    images: source images, see `with_images`."""
    several = [prompts] if isinstance(prompts, str | PromptRecord) else list(prompts)
    if wrong := [prompt for prompt in several if not isinstance(prompt, str | PromptRecord)]:
        raise TypeError(
            f"got {wrong[0]!r} as a prompt; expected a text, or a PromptRecord for one with metadata or images "
            "(flowalign.data.load_prompts reads them from a file)"
        )
    records = [PromptRecord(uid, prompt) if isinstance(prompt, str) else prompt for uid, prompt in enumerate(several)]
    return records if images is None else with_images(records, images)


def with_images(records: Sequence[PromptRecord], images: Sources) -> list[PromptRecord]:
    """The records with source images, pictures of Pillow or paths: one picture for all of them, or a list with one, or a list of several,
    for each; for a single record the list is all of its own. ValueError for another number, for records that have images already, and
    FileNotFoundError for a file that does not exist."""
    if given := [record.prompt for record in records if record.images]:
        raise ValueError(
            f"got images for the prompt {given[0]!r}, which has source images of its own; expected one or the other"
        )
    listed = list(images) if isinstance(images, list | tuple) else [images] * len(records)
    if len(records) == 1 and not any(isinstance(each, list | tuple) for each in listed):
        listed = [listed]
    if len(listed) != len(records):
        raise ValueError(
            f"got {len(listed)} images for {len(records)} prompts; expected one for all, or one, or a list of them, for each"
        )
    several = [own if isinstance(own, list | tuple) else (own,) for own in listed]
    owned = [tuple(source_image(each) for each in own) for own in several]
    for image in (image for own in owned for image in own):
        if lacks := image.missing():
            raise FileNotFoundError(f"image {image} {lacks} (working directory: {Path.cwd()}); expected an image file")
    return [replace(record, images=own) for record, own in zip(records, owned, strict=True)]


def load_prompts(source: str) -> list[PromptRecord]:
    """Reads a prompt set from a file, a public set by name with its file, or a function.

    `FILE`: a .txt, .jsonl, .json, .csv or .tsv (`flowalign.prompt_files.read_rows`). A row has "prompt", and if wanted "image" or
    "images", paths from the file's folder, which may lead into a .zip or .tar, and "negative_prompt"; all else is metadata. `NAME:FILE`, such as
    `drawbench:prompts/test.txt`: a set of `flowalign.prompt_sets.PROMPT_SETS`. `package.module:function`: of a callable that
    returns texts or such rows, its images pictures of Pillow or paths from the working directory. Raises ValueError or FileNotFoundError that names
    the source and the line."""
    name, _, file = source.partition(":")
    if name in PROMPT_SETS or source.endswith(SUFFIXES):
        chosen, path = _file(source, name, file)
        rows, folder = our_rows(chosen, source, read_rows(path, lines=chosen.lines)), path.parent / chosen.folder
    elif ":" in source:
        rows, folder = _call(source), Path()
    else:
        raise ValueError(
            f"got prompt source {source!r}; expected a file ({', '.join(SUFFIXES)}), a set with its file such as "
            "'drawbench:prompts/test.txt', or an import path such as 'flowalign.glyphs:train_prompts'"
        )
    records = [record_of(place, number, row, folder) for number, (place, row) in enumerate(rows)]
    if not records:
        raise ValueError(f"{source} holds no prompts; expected at least one")
    return records


def _file(source: str, name: str, file: str) -> tuple[PromptSet, Path]:
    """The set that a source names, and its file."""
    if name in PROMPT_SETS:
        if not file:
            raise ValueError(
                f"got the prompt set {source!r} without a file; expected '{name}:FILE': get {PROMPT_SETS[name].origin}"
            )
        path = Path(file).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"prompt file {path} does not exist (working directory: {Path.cwd()}): get {PROMPT_SETS[name].origin}"
            )
        return PROMPT_SETS[name], path
    path = Path(source).expanduser()
    if file and not path.exists():
        raise ValueError(
            f"got prompt source {source!r}, which is neither a file nor begins with the name of a prompt set; expected one of "
            f"{', '.join(PROMPT_SETS)}"
        )
    return PLAIN, path


OWN_KEYS = ("prompt", "image", "images", "negative_prompt")


LONGEST = 10_000  # characters of a prompt; encoders read a few hundred words


def record_of(place: str, uid: int, row: dict[str, Any], folder: Path) -> PromptRecord:
    """The prompt that a row holds; its image paths are from `folder`. ValueError or FileNotFoundError that names the place."""
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f"{place}: got {short(row)}; expected a non-empty text under 'prompt'")
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise ValueError(
            f"{place}: got negative_prompt={short(negative)}; expected a text, or none for the policy's own"
        )
    for text in (row["prompt"], negative or ""):
        _check_text(place, text)
    if "video" in row:
        raise ValueError(
            f"{place}: got 'video'={short(row['video'])}; expected none: no model here reads a source clip; a first frame goes under "
            "'image', clips to train on into the file of a trainer.source, and what a reward reads under another name"
        )
    if "image" in row and "images" in row:
        raise ValueError(f"{place}: got 'image' and 'images'; expected one of them: list all files under 'images'")
    given = [row["image"]] if "image" in row else row.get("images", [])
    if not isinstance(given, list) or not all(isinstance(image, str | Image.Image) for image in given):
        raise ValueError(
            f"{place}: got images {short(given)}; expected a path under 'image', or a list of paths under 'images'"
        )
    images = tuple(source_image(folder / image if isinstance(image, str) else image) for image in given)
    for image in images:
        try:
            lacks = image.missing()
        except OSError as error:
            raise ValueError(f"{place}: image {image} cannot be read ({error}); expected an image file") from error
        if lacks:
            raise FileNotFoundError(
                f"{place}: image {image} {lacks} (working directory: {Path.cwd()}); expected an image file"
            )
    metadata = {key: value for key, value in row.items() if key not in OWN_KEYS}
    return PromptRecord(uid, row["prompt"], metadata, images, negative)


def _check_text(place: str, text: str) -> None:
    """ValueError for what no encoder can read as a text."""
    if len(text) > LONGEST:
        raise ValueError(
            f"{place}: got a text of {len(text):,} characters, which begins {short(text)}; expected at most {LONGEST:,}: write "
            "one prompt a line"
        )
    if text.isprintable():  # most are, and there are thousands
        return
    strange = [char for char in text if unicodedata.category(char) in ("Cc", "Cs") and not char.isspace()]
    if strange:
        raise ValueError(
            f"{place}: got the control character U+{ord(strange[0]):04X} in {short(text)}; expected text: is this a text file?"
        )


def _call(source: str) -> list[Row]:
    module_name, _, name = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does
        raise ValueError(
            f"prompt source {source!r}: cannot import {module_name!r} ({type(error).__name__}: {error})"
        ) from error
    if not callable(vars(module).get(name)):
        raise ValueError(f"prompt source {source!r}: {module_name} has no function {name!r}")
    try:
        rows = vars(module)[name]()
        if isinstance(rows, str):
            raise TypeError("got one text")
        return [
            (f"{source}, prompt {number}", {"prompt": row} if isinstance(row, str) else {**row})
            for number, row in enumerate(rows, start=1)
        ]
    except (Exception, SystemExit) as error:  # whatever the function does
        raise ValueError(
            f"prompt source {source!r}: {type(error).__name__}: {error}; expected a function without arguments that returns texts, "
            "or objects with 'prompt'"
        ) from error


def digest(records: Sequence[PromptRecord]) -> str:
    """SHA-256 of the set with its metadata and the content of its images, by which a resumed run checks that its prompts are
    the same."""
    return hashlib.sha256(repr([_content(record) for record in records]).encode()).hexdigest()


def _content(record: PromptRecord) -> dict[str, Any]:
    """What must not change. Of images the bytes, wherever they lie; what a record does not have is left out."""
    content: dict[str, Any] = {"uid": record.uid, "prompt": record.prompt, "metadata": record.metadata}
    if record.images:
        content["images"] = [image.digest() for image in record.images]
    if record.negative_prompt is not None:
        content["negative_prompt"] = record.negative_prompt
    return content


def source_images(records: Sequence[PromptRecord], device: torch.device | str = "cpu") -> list[list[Tensor]] | None:
    """The source images of each record, [3, H, W] in [0, 1] (alpha is dropped), each decoded once; None if no record has any."""
    if not any(record.images for record in records):
        return None
    pixels = {image: read_image(image).to(device) for image in _distinct_images(records)}
    return [[pixels[image] for image in record.images] for record in records]


def check_images(records: Sequence[PromptRecord]) -> None:
    """ValueError for a source image that cannot be read; each is decoded once."""
    for image in _distinct_images(records):
        image.open()


def _distinct_images(records: Sequence[PromptRecord]) -> list[SourceImage]:
    return list(dict.fromkeys(image for record in records for image in record.images))
