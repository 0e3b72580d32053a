"""The files of the Glyphs CLIP: an open_clip folder, and its model card."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flowalign.glyphs.clip_figures import CAPTIONS, ClipFigures
from flowalign.glyphs.parts import EMBEDDING_STD, TOKENS
from rewards.image.preprocess import Preprocess

SIDE, MEAN, STD, WIDTH = 48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 128
PIXELS = Preprocess(SIDE, "squash", mean=MEAN, std=STD)

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


def configuration(tokenizer: Any) -> dict[str, Any]:
    """open_clip_config.json. Patches are columns as high as the picture: a letter is three or four of them."""
    tower = {"width": WIDTH, "mlp_ratio": 2.0}
    vision = {**tower, "image_size": SIDE, "patch_size": [SIDE, 4], "layers": 3, "head_width": 32, "pool_type": "avg"}
    text = {
        **tower, "layers": 2, "heads": 8, "context_length": TOKENS, "vocab_size": len(tokenizer), "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id, "hf_tokenizer_name": "glyphs",
    }  # fmt: skip
    seen = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": seen}


def untrained(config: dict[str, Any], seed: int) -> Any:
    """The network with random weights. Embeddings of deviation 0.02, as open_clip has them, would take long to tell
    letters apart."""
    import open_clip

    torch.manual_seed(seed)
    network = open_clip.CLIP(**config["model_cfg"])
    torch.nn.init.normal_(network.token_embedding.weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(network.positional_embedding, std=EMBEDDING_STD)
    return network


def export(network: Any, config: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Writes a folder that open_clip loads: configuration, weights in fp16, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.half() for name, value in network.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", {"format": "pt"})
    tokenizer.backend_tokenizer.no_padding()  # training left its own padding in what would be saved
    tokenizer.save_pretrained(folder)


def clip_card(
    figures: ClipFigures, recipe: dict[str, int | float], parameters: int, trusted: float, measured: int
) -> str:
    """README.md of the folder: how it was made, and figures as measured.

    trusted: share of the policy's samples whose reading was trusted. measured: how many samples were compared with OCR."""
    return _CARD.format(
        **vars(figures),
        recipe=json.dumps(recipe, indent=2),
        parameters=parameters,
        trusted=trusted,
        measured=measured,
        captions=CAPTIONS,
    )
