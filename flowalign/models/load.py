"""From a name, folder or hub id to a policy; and what can be known of a checkpoint before its weights are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from flowalign.models.lora import LoRA, add_lora, matched_modules
from flowalign.models.sd3 import SD3Policy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES = {"StableDiffusion3Pipeline": "sd3"}


def resolve(path: str) -> str:
    """ "glyphs" is the pipeline that comes with flowalign; anything else is a folder or a hub id."""
    if path != "glyphs":
        return path
    from flowalign.glyphs import PIPELINE

    return str(PIPELINE)


def inspect_checkpoint(path: str) -> dict[str, Any]:
    """The pipeline's model_index.json. Raises FileNotFoundError or ValueError before any weight is read."""
    name = resolve(path)
    local = Path(name)
    if local.exists() and not (local / "model_index.json").is_file():
        raise ValueError(f"policy.path={path!r} has no model_index.json; expected a diffusers pipeline folder")
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(
            f"policy.path={path!r} does not exist (working directory: {Path.cwd()}); expected 'glyphs', a diffusers "
            "pipeline folder, or a hub id such as 'stabilityai/stable-diffusion-3.5-medium'"
        )
    index = dict(StableDiffusion3Pipeline.load_config(name))
    if index.get("_class_name") not in FAMILIES:
        raise ValueError(f"policy.path={path!r} is a {index.get('_class_name')}; expected one of {', '.join(FAMILIES)}")
    return index


def check_lora_targets(path: str, targets: Sequence[str]) -> list[str]:
    """The modules that `targets` mean, from the transformer's config alone; ValueError if one means nothing."""
    inspect_checkpoint(path)
    config = SD3Transformer2DModel.load_config(resolve(path), subfolder="transformer")
    with init_empty_weights():
        return matched_modules(SD3Transformer2DModel.from_config(config), targets)


def load_policy(
    path: str = "glyphs",
    *,
    lora: LoRA | None = None,
    trainable: Literal["lora", "full", "none"] = "lora",
    dtype: Literal["fp32", "bf16"] = "fp32",
    max_sequence_length: int | None = None,
    negative_prompt: str = "",
    reference_copy: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> SD3Policy:
    """Loads a pipeline as a policy.

    trainable: "lora" (the default LoRA if none is given), "full" weights (fp32 only), or "none". dtype: of the frozen
    network; adapters are always fp32. max_sequence_length: of the T5 part, None = 256, and 0 for a pipeline without T5.
    seed: of the adapters' initial weights.
    reference_copy: keep a frozen copy, the reference of a full fine-tuning with a KL."""
    index = inspect_checkpoint(path)
    if trainable == "full" and dtype != "fp32":
        raise ValueError(f"policy.trainable=full with policy.dtype={dtype}: expected fp32 weights for the optimiser")
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resolve(path), torch_dtype=DTYPES[dtype], **dict.fromkeys(absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if part is not None:
            part.requires_grad_(False)
    pipeline.transformer.eval()
    pipeline.transformer.requires_grad_(trainable == "full")
    frozen = None
    if trainable == "lora":
        add_lora(pipeline.transformer, lora or LoRA(), seed)
    elif trainable == "full" and reference_copy:
        frozen = copy.deepcopy(pipeline.transformer).requires_grad_(False)
    length = max_sequence_length if max_sequence_length is not None else (0 if absent else 256)
    return SD3Policy(pipeline, negative_prompt=negative_prompt, max_sequence_length=length, frozen=frozen)
