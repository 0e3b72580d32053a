"""A checkpoint's pipeline without weights: every network on the meta device, from the configurations alone."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.load import DTYPES
from flowalign.models.shipped import resolve


def empty_pipeline(
    path: str, family: str | None = None, *, dtype: str = "fp32", vae_dtype: str | None = None
) -> DiffusionPipeline:
    """As `read_pipeline`, but no weight is read or allocated. Tokenizers and scheduler are real, and so are the texts' embeddings
    and the latents of source images, all 0: what a family makes of token ids and masks may depend on their values."""
    index, known = inspect_checkpoint(path, family)
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            parts[name] = None if name in known.load_arguments(index) else _part(path, name, *entry)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            nn.Module.to(part, DTYPES[(vae_dtype or dtype) if name == "vae" else dtype])  # that of diffusers warns
            if name == "vae":
                _encode_to_the_cpu(part)
            elif name not in known.networks:
                _answer_on_the_cpu(part)
    said = inspect.signature(known.pipeline.__init__).parameters
    settings = {name: value for name, value in index.items() if name in said and not isinstance(value, list)}
    pipeline = known.pipeline(**{**settings, **parts, **known.load_arguments(index)})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _part(path: str, name: str, library: str, kind: str) -> Any:
    """A component by its library and class in model_index.json; a network without weights."""
    cls = getattr(importlib.import_module(library), kind)
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(resolve(path), subfolder=name)
    with torch.device("meta"):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(resolve(path), subfolder=name))
        # its other kinds of attention look into the mask
        return cls(cls.config_class.from_pretrained(resolve(path), subfolder=name, attn_implementation="eager"))


IMAGES = (
    "pixel_values",
    "image_grid_thw",
)  # a forward looks into their numbers; their tokens stand among the ids already


def _answer_on_the_cpu(encoder: nn.Module) -> None:
    """From now on the encoder says that it is on the CPU, runs on the meta device, and answers zeros on the CPU. Not kept: what it makes
    of images, whose tokens are as texts."""
    dtype = next(encoder.parameters()).dtype
    encoder.register_parameter("place", Parameter(torch.empty(0, dtype=dtype)))  # the first tells the device
    encoder.register_forward_pre_hook(_blind, with_kwargs=True)
    encoder.register_forward_hook(lambda module, args, output: tree_map(_zeros, output))


def _blind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    unseen = IMAGES if "input_ids" in kwargs else ()  # an encoder of images alone sees them
    seen = {name: value for name, value in kwargs.items() if name not in unseen}
    return tree_map(_emptied, (args[:1], seen))  # the second is the mask, into which UMT5 looks with any attention


def _encode_to_the_cpu(vae: Any) -> None:
    """From now on `vae.encode` gives a posterior of zeros on the CPU."""
    encode = vae.encode

    def zeros(x: Tensor) -> Any:
        found = encode(x)
        found.latent_dist = type(found.latent_dist)(_zeros(found.latent_dist.parameters))
        return found

    vae.encode = zeros


def _emptied(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
