"""Which family a checkpoint is of, found by its model_index.json, and its networks without weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from flowalign.models.checkpoint_files import read_index
from flowalign.models.family import Family
from flowalign.models.shipped import SHIPPED, resolve

# pipeline class named in model_index.json -> its family, imported when it is used
FAMILIES = {
    "QwenImagePipeline": "flowalign.models.families.qwen_image.FAMILY",
    "QwenImageEditPipeline": "flowalign.models.families.qwen_image_edit.FAMILY",
    "QwenImageEditPlusPipeline": "flowalign.models.families.qwen_image_edit.PLUS",
    "StableDiffusion3Pipeline": "flowalign.models.families.sd3.FAMILY",
    "FluxPipeline": "flowalign.models.families.flux1.FAMILY",
    "FluxKontextPipeline": "flowalign.models.families.flux1.KONTEXT",
    "StableDiffusionPipeline": "flowalign.models.families.sd15.FAMILY",
    "Flux2KleinPipeline": "flowalign.models.families.flux2_klein.FAMILY",
    "ZImagePipeline": "flowalign.models.families.z_image.FAMILY",
    "SanaPipeline": "flowalign.models.families.sana.FAMILY",
    "StableDiffusionXLPipeline": "flowalign.models.families.sdxl.FAMILY",
    "HunyuanVideoPipeline": "flowalign.models.families.hunyuan_video.FAMILY",
    "WanPipeline": "flowalign.models.families.wan.FAMILY",
    "WanImageToVideoPipeline": "flowalign.models.families.wan.IMAGE_TO_VIDEO",
}


def inspect_checkpoint(path: str, family: str | None = None) -> tuple[dict[str, Any], Family]:
    """The pipeline's model_index.json, and its family: the one found by the pipeline's class, or `family`, the import path of
    another. Raises FileNotFoundError or ValueError before any weight is read."""
    name = resolve(path)
    local = Path(name)
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(
            f"got policy.path={path!r}, which does not exist (working directory: {Path.cwd()}); expected one of {', '.join(SHIPPED)}, a "
            "diffusers pipeline folder, or a hub id such as 'stabilityai/stable-diffusion-3.5-medium'"
        )
    index = read_index(local) if local.exists() else _hub_index(name)
    return index, family_of(f"policy.path={path!r}", str(index.get("_class_name")), family).of(index)


def _hub_index(name: str) -> dict[str, Any]:
    """model_index.json of a hub id; FileNotFoundError where it cannot be had."""
    try:
        return dict(DiffusionPipeline.load_config(name))
    except OSError as error:
        raise FileNotFoundError(
            f"got policy.path={name!r}, whose model_index.json cannot be had from the hub or its cache: {error} Expected a pipeline "
            "that this machine may read: accept its license on its page and log in (`hf auth login`), unset HF_HUB_OFFLINE, or "
            "name a folder that it was downloaded to"
        ) from error


def family_of(what: str, pipeline: str, family: str | None = None) -> Family:
    """The family of the pipeline class `pipeline`, or the one that `family`, an import path such as my_module.FAMILY, names.
    what: where the class was found. ValueError for none, or for a family of another pipeline class."""
    if family is None and pipeline not in FAMILIES:
        raise ValueError(
            f"got {what}, a {pipeline}; expected one of {', '.join(FAMILIES)}, or policy.family, the import path of a Family "
            "of your own"
        )
    found = _import_family(FAMILIES[pipeline] if family is None else family)
    if found.pipeline.__name__ != pipeline:
        raise ValueError(
            f"got {what}, a {pipeline}, with policy.family={family}; expected a {found.pipeline.__name__}, which that family is "
            "of: change one of the two"
        )
    return found


def _import_family(name: str) -> Family:
    module, _, attribute = name.rpartition(".")
    try:
        found = vars(importlib.import_module(module))[attribute]
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(
            f"got policy.family={name!r}, which cannot be imported ({error!r}); expected module.NAME of a flowalign.models.Family"
        ) from error
    if type(found) is not Family:
        raise ValueError(f"got policy.family={name!r}, a {type(found).__name__}; expected a flowalign.models.Family")
    return found


def empty_networks(path: str, family: Family) -> dict[str, ModelMixin]:
    configs = {name: kind.load_config(resolve(path), subfolder=name) for name, kind in family.networks.items()}
    with torch.device("meta"):  # the tables of positions too: that of SD3 is a gigabyte and takes seconds
        return {name: kind.from_config(configs[name]) for name, kind in family.networks.items()}
