"""Atomic files: written under a temporary name, fsynced, then renamed, so that a reader sees all of one or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class DamagedFile(ValueError):
    """A file of a run that cannot be read; the message names it and says what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which `path` is read and what is in it used: an error there is a DamagedFile that names it."""
    try:
        yield
    except DamagedFile:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path} cannot be read ({error!r}): restore it from a copy, or remove it") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without the file; DamagedFile for anything else."""
    if not path.exists():
        return {}
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"got a {type(content).__name__}; expected a JSON object")
    return content


def fsync(path: Path) -> None:
    """Flushes `path` to disk: a file's content, or a folder's entries (not what its files hold)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, making its folder: a crash leaves the former file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends `line` and a newline and waits for the disk; a crash may leave a torn last line, which readers drop.

    Raises ValueError if the file already ends in a torn line, which this call would glue to the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise ValueError(f"{path} ends in a torn line (a crash while writing): call cut_back before appending")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
