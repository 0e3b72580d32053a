"""`flowalign export`: what a run trained, at one of its checkpoints: its LoRA, or its networks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flowalign.errors import ConfigError
from flowalign.run.load import SavedRun, save_weights


def export(arguments: Sequence[str]) -> Path:
    """Writes the weights that the arguments ask for; returns its folder. ConfigError for what cannot be exported."""
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
    folder = given.output or saved.weights_folder
    save_weights(saved.load(), saved.policy.trainable, folder)
    return folder
