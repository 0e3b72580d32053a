"""The command that makes the shipped pipeline of a Glyphs world: scripts/pretrain_glyphs*.py."""

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from flowalign.glyphs.export import export, model_card
from flowalign.glyphs.progress import Progress, progress_bars
from flowalign.glyphs.training import Pretraining


class PretrainModule(Protocol):
    """A world's `pretrain` module. RECIPE: made the shipped pipeline; TRAINED: the parts that the flow trains."""

    @property
    def RECIPE(self) -> Pretraining: ...

    @property
    def TRAINED(self) -> tuple[str, ...]: ...

    def pretrain(self, recipe: Pretraining, folder: Path, progress: Progress) -> DiffusionPipeline: ...

    def vae_error(self, pipeline: Any) -> float: ...


def make(
    world: PretrainModule, load: Callable[[Path], DiffusionPipeline], measure: Callable[[Any], Iterable[str]], *,
    card: str, measured: int, checkpoints: str, description: str | None,
) -> None:  # fmt: skip
    """Trains, exports, measures what was exported and writes the card.

    load: reads the exported folder. measure: the rows of the card's table, of `measured` prompts. card: its text, see `model_card`.
    checkpoints: default of the command line's --checkpoints."""
    recipe = world.RECIPE
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--checkpoints", type=Path, default=Path(checkpoints), help="resumed if present")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="training step to stop at")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = replace(recipe, steps=given.steps, seed=given.seed)
    show = progress_bars({"vae": recipe.vae_steps, "flow": recipe.steps})
    export(world.pretrain(recipe, given.checkpoints, show), given.output)
    exported = load(given.output)
    exported.set_progress_bar_config(disable=True)
    parts = {name: exported.components[name] for name in (*world.TRAINED, "vae")}
    rows = []
    for row in measure(exported):
        print(row, flush=True)
        rows.append(row)
    text = model_card(card, parts, recipe, rows, vae_error=world.vae_error(exported), measured=measured)
    (given.output / "README.md").write_text(text, encoding="utf-8")
