"""Make the shipped Glyphs-Video pipeline from nothing.

`python scripts/pretrain_glyphs_video.py --output flowalign/glyphs/video/pipeline`

Two idle CPU cores need about forty minutes. Stop it at any time; the same command goes on from the last checkpoint.
"""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import WanPipeline

from flowalign.glyphs.export import export
from flowalign.glyphs.progress import progress_bars
from flowalign.glyphs.video import held_out_prompts
from flowalign.glyphs.video.card import model_card
from flowalign.glyphs.video.judge import Figures, judge, sample_clips
from flowalign.glyphs.video.pretrain import RECIPE, TRAINED, pretrain, vae_error

GRID = [(8, 1.0), (8, 2.0), (8, 3.0), (20, 1.0), (20, 3.0)]
MEASURED = 128  # held-out prompts


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("runs/pretrain_glyphs_video"), help="resumed if present"
    )
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="training step to stop at")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(RECIPE, steps=arguments.steps, seed=arguments.seed)
    pipeline = pretrain(recipe, arguments.checkpoints, progress_bars({"vae": recipe.vae_steps, "flow": recipe.steps}))
    export(pipeline, arguments.output)
    exported = WanPipeline.from_pretrained(arguments.output)
    card = model_card(
        {name: exported.components[name] for name in (*TRAINED, "vae")},
        asdict(recipe),
        measure(exported),
        vae_error=vae_error(exported),
        measured=MEASURED,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


def measure(pipeline: WanPipeline) -> dict[tuple[int, float], Figures]:
    """Figures on the first MEASURED held-out prompts, by (sampling steps, guidance scale)."""
    pipeline.set_progress_bar_config(disable=True)
    records = held_out_prompts()[:MEASURED]
    figures = {}
    for steps, scale in GRID:
        clips = sample_clips(pipeline, [record["prompt"] for record in records], steps, scale)
        figures[steps, scale] = judge(clips, records)
        print(f"{steps} steps, guidance {scale}: {figures[steps, scale]}", flush=True)
    return figures


if __name__ == "__main__":
    main()
