"""Make the shipped Glyphs pipeline from nothing.

`python scripts/pretrain_glyphs.py --output flowalign/glyphs/pipeline`

Two idle CPU cores need about ten minutes, and as many again to measure. Stop it at any time; the same
command goes on from the last checkpoint.
"""

from collections.abc import Iterator
from functools import partial

from diffusers import StableDiffusion3Pipeline

from flowalign.glyphs import LOAD_ARGS, held_out_prompts, pretrain
from flowalign.glyphs.card import CARD
from flowalign.glyphs.judge import judge, sample_pictures
from flowalign.glyphs.make import make

GRID = [(6, 1.0), (6, 1.5), (6, 2.0), (6, 3.0), (6, 4.0), (8, 1.0), (8, 2.0), (8, 3.0), (40, 1.0), (40, 3.0)]
MEASURED = 256  # held-out prompts


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    make(
        pretrain, partial(StableDiffusion3Pipeline.from_pretrained, **LOAD_ARGS), measure,
        card=CARD, measured=MEASURED, checkpoints="runs/pretrain_glyphs", description=__doc__,
    )  # fmt: skip


def measure(pipeline: StableDiffusion3Pipeline) -> Iterator[str]:
    """A row for each number of sampling steps and guidance scale, on the first MEASURED held-out prompts."""
    records = held_out_prompts()[:MEASURED]
    for steps, scale in GRID:
        row = judge(sample_pictures(pipeline, [record["prompt"] for record in records], steps, scale), records)
        yield f"| {steps} | {scale:g} | {row.exact:.1%} | {row.letters:.1%} | {row.colors:.1%} |"


if __name__ == "__main__":
    main()
