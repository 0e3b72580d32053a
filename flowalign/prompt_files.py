"""Prompt files as rows: a text a line, a JSON object a line, a JSON list, or a table with named columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
LFS = "version https://git-lfs.github.com/spec/"  # how a Git-LFS pointer begins

Row = tuple[str, dict[str, Any]]  # where it stands, for messages, and what it says


def read_rows(path: Path, *, lines: bool = False) -> list[Row]:
    """The rows of a file, by its suffix; a text is {"prompt": text}.

    .txt: a line each. .jsonl: a JSON object a line. .json: a list of texts or objects. .csv: names in the first line, cells
    with commas in double quotes. .tsv: the same with tabs, and a double quote is a character like others, as PartiPrompts has
    it. Cells are texts; of a table an empty `image` or `negative_prompt` is left out, as is a column without a name. Blank
    lines do not count. lines: a .json is read like a .jsonl. ValueError or FileNotFoundError that names the file and the line."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"got the prompt file {path}; expected a name that ends in {', '.join(SUFFIXES)}")
    text = _read(path)
    if path.suffix == ".json" and not lines:
        return _list(path, text)
    if path.suffix in (".csv", ".tsv"):
        return _table(path, text)
    # not splitlines: JSON texts may hold U+2028 and its like
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix == ".txt":
        return [(f"{path}, line {number}", {"prompt": line}) for number, line in numbered]
    return [_object(f"{path}, line {number}", line) for number, line in numbered]


def short(value: object) -> str:
    """Its repr, cut to about one line."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def parse(place: str, text: str) -> Any:
    """The JSON in a text; ValueError, which names the place, also for a key that stands there twice, and for NaN."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def _read(path: Path) -> str:
    if not path.is_file():
        lacks = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"prompt file {path} {lacks} (working directory: {Path.cwd()}); expected a file with a prompt a line"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read ({error.strerror}); expected a readable file") from error
    if text.startswith(LFS):
        raise ValueError(
            f"got {path}, a Git-LFS pointer; expected the prompts themselves: `git lfs pull` in its repository, or download the file"
        )
    return text


def _object(place: str, line: str) -> Row:
    row = parse(place, line)
    if not isinstance(row, dict):
        raise ValueError(f"{place}: got {type(row).__name__}; expected a JSON object")
    return place, row


def _list(path: Path, text: str) -> list[Row]:
    try:
        entries = parse(str(path), text)
    except ValueError as error:
        if "Extra data" in str(error):
            raise ValueError(f"{error}; a file with a JSON object a line is a .jsonl: rename it") from error
        raise
    if not isinstance(entries, list):
        raise ValueError(f"{path}: got {type(entries).__name__}; expected a list of texts or objects")
    rows = []
    for number, entry in enumerate(entries, start=1):
        place = f"{path}, entry {number}"
        if not isinstance(entry, str | dict):
            raise ValueError(f"{place}: got {short(entry)}; expected a text or an object")
        rows.append((place, {"prompt": entry} if isinstance(entry, str) else entry))
    return rows


def _table(path: Path, text: str) -> list[Row]:
    tabs = path.suffix == ".tsv"
    reader = csv.reader(
        io.StringIO(text),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names: list[str] = []
    rows: list[Row] = []
    while True:
        place = f"{path}, line {reader.line_num + 1}"  # the first of a row with line breaks in its cells
        try:
            cells = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            raise ValueError(f"{place}: not a table ({error}); expected cells with quotes closed") from error
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = [cell.strip() for cell in cells]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"{place}: got the column {twice[0]!r} twice; expected different names")
            continue
        if len(cells) != len(names):
            raise ValueError(f"{place}: got {len(cells)} cells; expected {len(names)}, those of {names}")
        rows.append((place, {name: cell for name, cell in zip(names, cells, strict=True) if _says(name, cell)}))


def _says(name: str, cell: str) -> bool:
    return bool(name) and (bool(cell) or name not in ("image", "negative_prompt"))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
