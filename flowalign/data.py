"""Prompt sets: where prompts come from, and which of them an iteration uses."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samplers.noise import generator


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. uid: its row in the set (two rows of equal text are two prompts). metadata: for rewards."""

    uid: int
    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(source: str) -> list[PromptRecord]:
    """Reads a prompt set from `file.txt` (a prompt a line), `file.jsonl` (objects with "prompt"; the other keys become
    metadata) or an import path `package.module:function` of a callable that returns such objects.

    Raises ValueError or FileNotFoundError that names the source and the line."""
    if source.endswith((".txt", ".jsonl")):
        rows = _read_rows(Path(source))
    elif ":" in source:
        rows = _call(source)
    else:
        raise ValueError(
            f"got prompt source {source!r}; expected a .txt file, a .jsonl file, or an import path such as "
            "'flowalign.glyphs:train_prompts'"
        )
    records = []
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f"{source}, prompt {number + 1}: got {row!r}; expected a non-empty text under 'prompt'")
        records.append(PromptRecord(number, row["prompt"], {k: v for k, v in row.items() if k != "prompt"}))
    if not records:
        raise ValueError(f"{source} holds no prompts; expected at least one")
    return records


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist (working directory: {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    # not splitlines: JSON texts may hold U+2028 and its like
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix == ".txt":
        return [{"prompt": line} for _, line in lines]
    return [_parse(f"{path}, line {number}", line) for number, line in lines]


def _parse(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got {type(row).__name__}; expected a JSON object")
    return row


def _call(source: str) -> list[dict[str, Any]]:
    module_name, _, name = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"prompt source {source!r}: cannot import {module_name!r} ({error})") from error
    if not callable(vars(module).get(name)):
        raise ValueError(f"prompt source {source!r}: {module_name} has no function {name!r}")
    try:
        return [{**row} for row in vars(module)[name]()]
    except TypeError as error:
        raise ValueError(
            f"prompt source {source!r}: {error}; expected a function without arguments that returns objects with 'prompt'"
        ) from error


def digest(records: Sequence[PromptRecord]) -> str:
    """SHA-256 of the set with its metadata, by which a resumed run checks that its prompts are the same."""
    return hashlib.sha256(repr([vars(record) for record in records]).encode()).hexdigest()


def prompts_of_iteration(records: Sequence[PromptRecord], count: int, seed: int, iteration: int) -> list[PromptRecord]:
    """The `count` prompts of an iteration (0 is the first): the set is read in an order that is shuffled for each epoch, and
    an iteration may span two epochs. A function of (seed, iteration) alone, so a resumed run needs no data position."""
    chosen = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, len(records))
        order = generator(seed, "data", epoch).permutation(len(records))
        chosen.append(records[int(order[place])])
    return chosen
