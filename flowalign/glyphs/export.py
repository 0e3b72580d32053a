"""A trained Glyphs pipeline as a folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase


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


def parts_list(parts: Mapping[str, nn.Module]) -> str:
    """A line of Markdown per part: its name, class and size."""
    return "\n".join(
        f"- `{name}`: {type(part).__name__}, {sum(value.numel() for value in part.parameters()):,} parameters"
        for name, part in parts.items()
    )
