"""A trained pipeline of a Glyphs world as a folder, with its model card."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from flowalign.glyphs.prompts import HELD_OUT_WORDS, INKS, PAPERS, TRAIN_WORDS
from flowalign.glyphs.training import Pretraining


def export(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves the pipeline in fp16; loaded, it is fp32 unless asked otherwise."""
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedTokenizerBase):
            part.backend_tokenizer.no_padding()  # training left its own padding in what would be saved
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    for path in folder.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"  # transformers would load in the dtype written here, diffusers always in fp32
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(
    text: str, parts: Mapping[str, nn.Module], recipe: Pretraining, rows: Iterable[str], *, vae_error: float, measured: int
) -> str:  # fmt: skip
    """README.md of the folder: a world's text with its parts, recipe and figures as measured, a table's rows."""
    sizes = {name: sum(value.numel() for value in part.parameters()) for name, part in parts.items()}
    return text.format(
        parts="\n".join(
            f"- `{name}`: {type(parts[name]).__name__}, {size:,} parameters" for name, size in sizes.items()
        ),
        vae_error=vae_error,
        measured=measured,
        inks=", ".join(INKS),
        papers=", ".join(PAPERS),
        held_out=HELD_OUT_WORDS,
        train=TRAIN_WORDS,
        recipe=json.dumps(asdict(recipe), indent=2),
        figures="\n".join(rows),
    )
