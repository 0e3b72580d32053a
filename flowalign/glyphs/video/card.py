"""The model card of an exported Glyphs-Video pipeline."""

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [wan, toy, alignment]
---

# Glyphs-Video

A very small but real `WanPipeline`: prompts such as `the word "CAT" in red turning blue on a white background moving left then up`,
clips of 9 frames of 32x64 pixels. It is the base model on which flowalign's methods for video are tried on a CPU, so it is meant
to be imperfect: training was stopped where a good part of the words, not all, are readable.

```python
from diffusers import WanPipeline
from flowalign.glyphs.video import CALL_ARGS, PIPELINE

pipeline = WanPipeline.from_pretrained(PIPELINE)
clip = pipeline('the word "CAT" in red on a white background moving left then up', num_inference_steps=8, guidance_scale=1.0,
                **CALL_ARGS).frames[0]
```

Weights are fp16 on disk and load as fp32. The empty prompt was trained too, so guidance works.

## Parts

{parts}

The tokenizer has one token for each of the template's words and spells what is quoted: `"CAT"` is `"C`, `A`, `T"`, since T5 has no absolute
positions. The VAE takes 2x2 pixels together, as that of Wan 2.2's 5B, and makes of 4x4 pixels and two frames a latent of 20
channels; its reconstruction error (mean |difference| on [-1, 1]) is {vae_error:.4f}.

## How it was made

`python scripts/pretrain_glyphs_video.py --output flowalign/glyphs/video/pipeline`, from random weights, on clips drawn on the fly: three
random capitals in DejaVu Sans Mono Bold, inks {inks}, papers {papers}; half of the words turn to another
ink; from the middle 1 pixel from frame to frame in one direction for half of the clip, then in one for the other half. Three of four
batches of the first 2,000 steps are images, then one of five; from step 3,000 on 30 % of the captions tell two directions drawn anew, as captions
from the web may, so that an action is mostly followed, not always. The {held_out} held-out words never
occur in it; the {train} words of the training prompts are for alignment and get no special place.

```json
{recipe}
```

## Figures

On the first {measured} held-out prompts, with the shipped scheduler and one fixed noise seed. Exact: of first, middle and last frames, the share
that RapidOCR's recognizer reads letter by letter ("0" counts as "O"; of rendered clips 99.7 %). Colors: paper, first and last ink all
nearest to the named ones. Directions: of the steps from frame to frame, by the center of the ink.

| steps | guidance | exact | colors | directions |
|---:|---:|---:|---:|---:|
{figures}
"""
