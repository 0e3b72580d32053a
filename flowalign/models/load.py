"""Loads a policy from a name, a folder or a hub id, and checks a checkpoint's configurations before its weights are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from torch import nn

from flowalign.models.base import Family, Policy, check_size
from flowalign.models.families import sd3, sd15
from flowalign.models.lora import LoRA, add_lora, matched_modules
from flowalign.models.pipeline_policy import PipelinePolicy
from samplers import Path as NoisingPath

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# pipeline class named in model_index.json -> its family
FAMILIES: dict[str, Family] = {"StableDiffusion3Pipeline": sd3.FAMILY, "StableDiffusionPipeline": sd15.FAMILY}


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
        raise ValueError(
            f"got policy.path={path!r} without a model_index.json; expected a diffusers pipeline folder: save one with "
            "pipe.save_pretrained"
        )
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(
            f"got policy.path={path!r}, which does not exist (working directory: {Path.cwd()}); expected 'glyphs', a "
            "diffusers pipeline folder, or a hub id such as 'stabilityai/stable-diffusion-3.5-medium'"
        )
    index = dict(DiffusionPipeline.load_config(name))
    if index.get("_class_name") not in FAMILIES:
        raise ValueError(
            f"got policy.path={path!r}, a {index.get('_class_name')}; expected one of {', '.join(FAMILIES)}"
        )
    return index


def path_of(path: str) -> NoisingPath:
    """The noising law of a checkpoint, from its scheduler's config alone; ValueError for a scheduler we cannot follow."""
    index = inspect_checkpoint(path)
    family = FAMILIES[index["_class_name"]]
    settings = dict(DDIMScheduler.load_config(resolve(path), subfolder="scheduler"))  # reads the file of any class
    family.path(settings)
    # diffusers loads the class that model_index.json names, whatever the scheduler's own file says
    return family.path({**settings, "_class_name": index["scheduler"][1]})


def check_image_size(path: str, height: int, width: int) -> None:
    """ValueError unless the model can make images of this size; from configurations alone."""
    family = FAMILIES[inspect_checkpoint(path)["_class_name"]]
    network = dict(family.network.load_config(resolve(path), subfolder=family.part))
    blocks = AutoencoderKL.load_config(resolve(path), subfolder="vae")["block_out_channels"]
    check_size(height, width, family.unit(network, 2 ** (len(blocks) - 1)))


def check_lora_targets(path: str, targets: Sequence[str] | None) -> list[str]:
    """The modules that `targets` match, from the network's config alone; ValueError if one matches nothing."""
    family = FAMILIES[inspect_checkpoint(path)["_class_name"]]
    config = family.network.load_config(resolve(path), subfolder=family.part)
    with init_empty_weights():
        return matched_modules(family.network.from_config(config), family.targets if targets is None else targets)


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
    network_device: str | torch.device | None = None,
    seed: int = 0,
) -> Policy:
    """Loads a pipeline as a policy.

    trainable: "lora" (the default LoRA if none is given), "full" weights (fp32 only), or "none". dtype: of the frozen
    network; adapters are always fp32. max_sequence_length: see the family's model. seed: of the adapters' initial
    weights. network_device: the trained network's device if it is not `device` (see flowalign.distributed.fsdp2).
    reference_copy: keeps a frozen copy of the network, the reference of a full fine-tuning with a KL.
    Raises FileNotFoundError or ValueError, as far as possible before any weight is read."""
    index = inspect_checkpoint(path)
    path_of(path)  # refuses a scheduler before the weights are read
    if trainable == "full" and dtype != "fp32":
        raise ValueError(
            f"got policy.trainable=full with policy.dtype={dtype}; expected fp32 weights for the optimizer"
        )
    family = FAMILIES[index["_class_name"]]
    pipeline = DiffusionPipeline.from_pretrained(
        resolve(path), torch_dtype=DTYPES[dtype], **family.load_arguments(index)
    )
    pipeline.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            elsewhere = name == family.part and network_device is not None
            part.requires_grad_(False).to(network_device if elsewhere else device)
    network = pipeline.components[family.part].eval()
    network.requires_grad_(trainable == "full")
    frozen = None
    if trainable == "lora":
        lora = lora or LoRA()
        add_lora(network, lora, family.targets if lora.targets is None else lora.targets, seed)
    elif trainable == "full" and reference_copy:
        frozen = copy.deepcopy(network).requires_grad_(False)
    model = family.model(pipeline, max_sequence_length)
    return PipelinePolicy(model, family.part, negative_prompt=negative_prompt, frozen=frozen)
