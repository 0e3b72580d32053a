"""The model card of an exported Glyphs-Edit pipeline."""

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [flux, kontext, toy, alignment]
---

# Glyphs-Edit

A very small but real `FluxKontextPipeline`: a picture of Glyphs, 24x48 pixels, and an instruction: `write it in blue`, `put it on a pink
background`, `change the word to "LAMP"`. It is the base model on which flowalign's methods for edits are tried on a CPU, so it is
meant to be imperfect: training was stopped where a good part of the new words, not all, are readable.

```python
from diffusers import FluxKontextPipeline
from flowalign.glyphs.edit import CALL_ARGS, PIPELINE, held_out_prompts

pipeline = FluxKontextPipeline.from_pretrained(PIPELINE)
edit = held_out_prompts()[2]
image = pipeline(prompt=edit["prompt"], image=edit["image"], num_inference_steps=8, guidance_scale=1.0, **CALL_ARGS).images[0]
```

`CALL_ARGS` keeps the pipeline from making about 1024² pixels. Weights are fp16 on disk and load as fp32. The guidance scale is an
input, as of the released model, but was drawn at random while training: it means nothing.

## Parts

{parts}

T5 has no absolute positions: `"LAMP"` is `"L`, `A`, `M`, `P"`. The VAE makes of 2x2 pixels a latent of 12 channels; its
reconstruction error (mean |difference| on [-1, 1]) is {vae_error:.4f}.

## How it was made

`python scripts/pretrain_glyphs_edit.py --output flowalign/glyphs/edit/pipeline`, from random weights, on edits drawn on the fly, two
of three of words, since colors are learnt soon. The words of the {held_out} held-out edits never occur in it; those of the {train} training edits are for
alignment and get no special place.

```json
{recipe}
```

## Figures

On the first {measured} held-out edits, with the shipped scheduler and one fixed noise seed. Exact: the share whose word is read letter by letter by
RapidOCR's recognizer ("0" counts as "O"). Colors: ink and paper both nearest to the right ones. Kept: 1 - mean |difference| to the
source, where the right result equals it.

| steps | changed | exact | colors | kept |
|---:|---|---:|---:|---:|
{figures}
"""
