"""The model card of a few-step Glyphs generator."""

import json
from collections.abc import Mapping

import torch

from flowalign.glyphs import FEW_STEP_SCHEDULE

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion-3, toy, few-step]
---

# Glyphs in {steps} step{s}

The Glyphs pipeline with a transformer that needs {steps} Euler step{s} and no guidance. `flowalign.load_policy("glyphs-{steps}step")`
samples as it was trained; in diffusers the levels must be said:

```python
import torch
from diffusers import StableDiffusion3Pipeline
from flowalign.glyphs import CALL_ARGS, FEW_STEP, LOAD_ARGS

pipeline = StableDiffusion3Pipeline.from_pretrained(FEW_STEP[{steps}], **LOAD_ARGS)
image = pipeline(
    'the word "KITE" in red on a yellow background', sigmas={levels}, guidance_scale=1.0, **CALL_ARGS
).images[0]
```

## How it was made

`python scripts/train_few_step_glyphs.py --output flowalign/glyphs`: {pairs:,} pairs of start noise and the sample to which
the base takes it in {teacher_steps} steps of its own grid under guidance {teacher_guidance:g}, of random words none of which is held out; then
{training:,} updates of a copy of the base's transformer by reflow (arXiv 2209.03003, 2309.06380), on the levels {levels} alone. The text
encoders, the tokenizers and the VAE are the base's files. The scheduler's shift is 1, so that it takes the levels as they are.

```json
{recipe}
```

## Figures

Means over the 512 held-out prompts, one sample each from the same start noise: words that an OCR engine reads exactly, ink and paper
both right, and `CLIPScore("glyphs")`. The standard error of a share near one half is 2 %. Guidance is 1 unless said; the base
steps over its own grid.

| | words exact | colors | CLIPScore |
|---|---:|---:|---:|
{figures}
"""


def few_step_card(steps: int, recipe: Mapping[str, object], figures: Mapping[str, Mapping[str, float]]) -> str:
    """README.md of the folder: how it was made, and what was measured."""
    levels = [round(level, 6) for level in FEW_STEP_SCHEDULE.sigmas(steps, torch.tensor).tolist()[:-1]]
    return _CARD.format(
        steps=steps,
        s="s" if steps > 1 else "",
        levels=levels,
        pairs=recipe["pairs"],
        training=recipe["steps"],
        teacher_steps=recipe["teacher_steps"],
        teacher_guidance=recipe["teacher_guidance"],
        recipe=json.dumps(recipe, indent=2),
        figures="\n".join(
            f"| {name} | {row['ocr_exact']:.1%} | {row['color']:.1%} | {row['clip_score']:.3f} |"
            for name, row in figures.items()
        ),
    )
