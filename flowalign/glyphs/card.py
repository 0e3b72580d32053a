"""The model card of an exported Glyphs pipeline."""

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion-3, toy, alignment]
---

# Glyphs

A very small but real `StableDiffusion3Pipeline`: prompts such as `the word "KITE" in red on a yellow background`,
pictures of 24x48 pixels. It is the base model on which flowalign's methods are tried on a CPU, so it is meant to be
imperfect: training was stopped where a good part of the words, not all, are readable.

```python
from diffusers import StableDiffusion3Pipeline
from flowalign.glyphs import CALL_ARGS, LOAD_ARGS, PIPELINE

pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, **LOAD_ARGS)
image = pipeline('the word "KITE" in red on a yellow background', num_inference_steps=6, guidance_scale=1.0,
                 **CALL_ARGS).images[0]
```

`LOAD_ARGS` is text_encoder_3=None and tokenizer_3=None; `CALL_ARGS` is height 24, width 48 and max_sequence_length 0
(there is no T5, in whose place SD3 would append 256 zero tokens). Weights are fp16 on disk and load as fp32. The empty
prompt was trained too, so guidance works.

## Parts

{parts}

The tokenizer knows the template's words and spells everything else letter by letter: unseen words are spelt, never
unknown. One-layer CLIP encoders make `hidden_states[-2]`, which SD3 reads, token plus position embedding. The VAE has
one level, so latents are 24x48 too, of variance 1, close to the pixels; its reconstruction error (mean |difference| on
[-1, 1]) is {vae_error:.4f}. Weights are stored in fp16 and were trained in fp32. The third text encoder is absent.

## How it was made

`python scripts/pretrain_glyphs.py --output flowalign/glyphs/pipeline`, from random weights, on pictures drawn on the
fly: four random capitals in DejaVu Sans Mono Bold, inks {inks}, papers {papers}, moved by up to
one pixel along each axis. The {held_out} held-out words never occur in it; the {train} words of the training prompts
are for alignment and get no special place.
With two idle cores the VAE took about 50 s and a step of the flow model about 0.34 s.

```json
{recipe}
```

## Figures

On the first {measured} held-out prompts, with the shipped scheduler and one fixed noise seed. A word counts as exact if
RapidOCR's recognizer reads it letter by letter ("0" counts as "O"; ground truth so reads 100 %); letters: right in
their place; colors: ink and paper both nearest to the named ones. The standard error of a share near one half is
3 %.

| steps | guidance | exact | letters | colors |
|---:|---:|---:|---:|---:|
{figures}

## Limits

Four capitals and 16 color pairs are all it can do. Figures depend on the number of sampling steps, as the table shows.
"""
