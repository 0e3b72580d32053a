"""Make the shipped Glyphs-Edit pipeline from nothing.

`python scripts/pretrain_glyphs_edit.py --output flowalign/glyphs/edit/pipeline`

Two idle CPU cores need about half an hour. Stop it at any time; the same command goes on from the last checkpoint.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline

from flowalign.glyphs.edit import held_out_prompts
from flowalign.glyphs.edit.card import model_card
from flowalign.glyphs.edit.figures import Figures, judge, sample_edits
from flowalign.glyphs.edit.pretrain import RECIPE, TRAINED, pretrain, vae_error
from flowalign.glyphs.edit.prompts import Axis
from flowalign.glyphs.export import export
from flowalign.glyphs.progress import progress_bars

STEPS = (8, 20)
MEASURED = 192  # held-out edits


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("runs/pretrain_glyphs_edit"), help="resumed if present"
    )
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="training step to stop at")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(RECIPE, steps=arguments.steps, seed=arguments.seed)
    pipeline = pretrain(recipe, arguments.checkpoints, progress_bars({"vae": recipe.vae_steps, "flow": recipe.steps}))
    export(pipeline, arguments.output)
    exported = FluxKontextPipeline.from_pretrained(arguments.output)
    card = model_card(
        {name: exported.components[name] for name in (*TRAINED, "vae")},
        asdict(recipe),
        measure(exported),
        vae_error=vae_error(exported),
        measured=MEASURED,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


def measure(pipeline: FluxKontextPipeline) -> dict[int, Mapping[Axis, Figures]]:
    """Figures on the first MEASURED held-out edits, by sampling steps."""
    pipeline.set_progress_bar_config(disable=True)
    records = held_out_prompts()[:MEASURED]
    figures: dict[int, Mapping[Axis, Figures]] = {}
    for steps in STEPS:
        figures[steps] = judge(sample_edits(pipeline, records, steps, 1.0), records)
        print(f"{steps} steps: {figures[steps]}", flush=True)
    return figures


if __name__ == "__main__":
    main()
