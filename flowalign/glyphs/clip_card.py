"""The model card of the Glyphs CLIP."""

import json

from flowalign.glyphs.clip_figures import CAPTIONS, ClipFigures

_CARD = """\
---
license: apache-2.0
library_name: open_clip
tags: [clip, toy, alignment]
---

# Glyphs CLIP

A CLIP of {parameters:,} parameters for the pictures and prompts of Glyphs, such as `the word "KITE" in red on a
yellow background`: `rewards.CLIPScore("glyphs")` is its cosine. It loads offline, runs on a CPU and has gradients to
the pixels. Licence: that of the package, Apache-2.0.

## How it was made

`python scripts/train_glyphs_clip.py --output rewards/image/glyphs_clip`, from random weights, with a symmetric
InfoNCE loss on pictures of the renderer (a little blurred, noisy, tinted and moved). No caption holds a held-out
word. Negatives: scenes of the same batch that differ in one letter or one color; and for each caption a damaged copy of
its picture (mixed or cut with another letter or color, blurred, or partly blank). A part of each batch are samples of
the Glyphs base model for training prompts. {trusted:.0%} of them are captioned by the four letters that RapidOCR
reads in them with confidence; the others are damaged pictures of what was asked for.

Pictures of 24x48 are resized to 48x48; patches are columns of 48x4. The tokenizer is that of the Glyphs pipeline.
Weights are fp16 on disk and load as fp32.

```json
{recipe}
```

## Figures

| on held-out words | |
|---|---:|
| top-1 of a drawn picture among {captions} held-out captions | {top1:.1%} |
| top-1 among {captions} captions that differ in one letter | {top1_letter:.1%} |
| top-1 among 7 captions that differ in one color | {top1_color:.1%} |
| Pearson correlation with OCR (soft), {measured} samples of the base model | {ocr_pearson:.2f} |
| Spearman correlation with OCR (soft), {measured} samples of the base model | {ocr_spearman:.2f} |

## Limits

It knows four capitals in one font and 16 color pairs; of any other prompt or picture its cosine says nothing. A
reward that can be differentiated can be climbed without the word becoming readable: evaluate with OCR beside it. Part
of its captions come from OCR itself, so its agreement with OCR is not that of two independent judges. It reads the
renderer's letters far better than the half-drawn ones of a policy, as the correlations show.
"""


def clip_card(
    figures: ClipFigures, recipe: dict[str, int | float], parameters: int, trusted: float, measured: int
) -> str:
    """README.md of the folder: how it was made, and figures as measured."""
    return _CARD.format(
        **vars(figures),
        recipe=json.dumps(recipe, indent=2),
        parameters=parameters,
        trusted=trusted,
        measured=measured,
        captions=CAPTIONS,
    )
