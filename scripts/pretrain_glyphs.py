"""Make the shipped Glyphs pipeline from nothing.

`python scripts/pretrain_glyphs.py --output flowalign/glyphs/pipeline`

Two idle CPU cores need about ten minutes, and as many again to measure. Stop it at any time; the same
command goes on from the last checkpoint.
"""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from flowalign.glyphs import LOAD_ARGS, held_out_prompts
from flowalign.glyphs.card import model_card
from flowalign.glyphs.export import export
from flowalign.glyphs.judge import Figures, judge, sample_pictures
from flowalign.glyphs.pretrain import TRAINED, pretrain, vae_error
from flowalign.glyphs.progress import progress_bars
from flowalign.glyphs.training import Pretraining

GRID = [(6, 1.0), (6, 1.5), (6, 2.0), (6, 3.0), (6, 4.0), (8, 1.0), (8, 2.0), (8, 3.0), (40, 1.0), (40, 3.0)]
MEASURED = 256  # held-out prompts


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    recipe = Pretraining()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/pretrain_glyphs"), help="resumed if present")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="training step to stop at")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(recipe, steps=arguments.steps, seed=arguments.seed)
    pipeline = pretrain(recipe, arguments.checkpoints, progress_bars({"vae": recipe.vae_steps, "flow": recipe.steps}))
    export(pipeline, arguments.output)
    exported = StableDiffusion3Pipeline.from_pretrained(arguments.output, **LOAD_ARGS)
    card = model_card(
        {name: exported.components[name] for name in (*TRAINED, "vae")},
        asdict(recipe),
        measure(exported),
        vae_error=vae_error(exported),
        measured=MEASURED,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


def measure(pipeline: StableDiffusion3Pipeline) -> dict[tuple[int, float], Figures]:
    """Figures on the first MEASURED held-out prompts, by (sampling steps, guidance scale)."""
    pipeline.set_progress_bar_config(disable=True)
    records = held_out_prompts()[:MEASURED]
    figures = {}
    for steps, scale in GRID:
        pictures = sample_pictures(pipeline, [record["prompt"] for record in records], steps, scale)
        figures[steps, scale] = judge(pictures, records)
        print(f"{steps} steps, guidance {scale}: {figures[steps, scale]}", flush=True)
    return figures


if __name__ == "__main__":
    main()
