"""`--image` of commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowalign.data import PromptRecord, with_images
from flowalign.errors import ConfigError


def with_source(records: Sequence[PromptRecord], files: Sequence[Path] | None) -> list[PromptRecord]:
    """The prompts with source images: one file for all of them, or one for each; several files of a single prompt are all its own.
    ConfigError for another number, for prompts that have their own, and for a file that does not exist."""
    if files is None:
        return list(records)
    try:
        return with_images(records, files[0] if len(files) == 1 else files)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--image: {error}") from error
