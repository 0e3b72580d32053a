"""Make the shipped Glyphs-Edit pipeline from nothing.

`python scripts/pretrain_glyphs_edit.py --output flowalign/glyphs/edit/pipeline`

Two idle CPU cores need about half an hour. Stop it at any time; the same command goes on from the last checkpoint.
"""

from collections.abc import Iterator

from diffusers import FluxKontextPipeline

from flowalign.glyphs.edit import held_out_prompts, pretrain
from flowalign.glyphs.edit.card import CARD
from flowalign.glyphs.edit.figures import judge, sample_edits
from flowalign.glyphs.make import make

STEPS = (8, 20)
MEASURED = 192  # held-out edits


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    make(
        pretrain, FluxKontextPipeline.from_pretrained, measure,
        card=CARD, measured=MEASURED, checkpoints="runs/pretrain_glyphs_edit", description=__doc__,
    )  # fmt: skip


def measure(pipeline: FluxKontextPipeline) -> Iterator[str]:
    """A row for each number of sampling steps and what is changed, on the first MEASURED held-out edits."""
    records = held_out_prompts()[:MEASURED]
    for steps in STEPS:
        for axis, row in judge(sample_edits(pipeline, records, steps, 1.0), records).items():
            yield f"| {steps} | {axis} | {row.exact:.1%} | {row.colors:.1%} | {row.kept:.3f} |"


if __name__ == "__main__":
    main()
