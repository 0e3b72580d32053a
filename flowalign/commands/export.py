"""`flowalign export`: the LoRA of a run at one of its checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flowalign.errors import ConfigError
from flowalign.run.load import SavedRun


def export(arguments: Sequence[str]) -> Path:
    """Writes the LoRA that the arguments ask for; returns its folder. ConfigError for what cannot be exported."""
    parser = argparse.ArgumentParser(prog="flowalign export", exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("run")
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction)
    parser.add_argument("--output", type=Path)
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"flowalign export: {error}") from error
    if unknown:
        raise ConfigError(
            f"flowalign export: got {' '.join(unknown)}; expected RUN [--step N] [--ema | --no-ema] [--output FOLDER]"
        )
    saved = SavedRun.of(given.run, given.step, given.ema)
    if saved.policy.trainable != "lora":
        raise ConfigError(
            f"got {saved.folder}, a run that trains full weights; expected one with a LoRA: fa.load_run gives its policy"
        )
    folder = given.output or saved.lora_folder
    saved.load().save_lora(folder)
    return folder
