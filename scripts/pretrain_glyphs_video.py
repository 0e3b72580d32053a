"""Make the shipped Glyphs-Video pipeline from nothing.

`python scripts/pretrain_glyphs_video.py --output flowalign/glyphs/video/pipeline`

Two idle CPU cores need about forty minutes. Stop it at any time; the same command goes on from the last checkpoint.
"""

from collections.abc import Iterator

from diffusers import WanPipeline

from flowalign.glyphs.make import make
from flowalign.glyphs.video import held_out_prompts, pretrain
from flowalign.glyphs.video.card import CARD
from flowalign.glyphs.video.judge import judge, sample_clips

GRID = [(8, 1.0), (8, 2.0), (8, 3.0), (20, 1.0), (20, 3.0)]
MEASURED = 128  # held-out prompts


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    make(
        pretrain, WanPipeline.from_pretrained, measure,
        card=CARD, measured=MEASURED, checkpoints="runs/pretrain_glyphs_video", description=__doc__,
    )  # fmt: skip


def measure(pipeline: WanPipeline) -> Iterator[str]:
    """A row for each number of sampling steps and guidance scale, on the first MEASURED held-out prompts."""
    records = held_out_prompts()[:MEASURED]
    for steps, scale in GRID:
        row = judge(sample_clips(pipeline, [record["prompt"] for record in records], steps, scale), records)
        yield f"| {steps} | {scale:g} | {row.exact:.1%} | {row.colors:.1%} | {row.directions:.1%} |"


if __name__ == "__main__":
    main()
