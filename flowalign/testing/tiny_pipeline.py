"""A very small random pipeline of each model family, from what its `Family.tiny` says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowalign.models.checkpoints import FAMILIES
from flowalign.models.family import Family
from flowalign.testing.tokenizers import tiny_tokenizer

SHAKE = 0.05  # added to every weight: a layer that starts at 0 has to matter


def tiny_names() -> list[str]:
    """The names that `tiny_pipeline` knows: one or several of each family."""
    return sorted(name for family in _families() for name in family.tiny)


def tiny_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A random pipeline of the real classes (fp32, on the CPU, a megabyte or two), with the released scheduler, for sizes that
    are multiples of 32 pixels; equal seeds give equal weights, and torch's own generator is left as it was.

    `tiny_pipeline("sd3").save_pretrained(folder)` makes a checkpoint that `policy.path` takes. Its text encoders read letters or
    bytes. ValueError for a name that is not in `tiny_names()`."""
    family = next((family for family in _families() if name in family.tiny), None)
    if family is None:
        raise ValueError(f"got {name!r}; expected one of {', '.join(tiny_names())}")
    said = family.tiny[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            part: tiny_tokenizer(*entry) for part, entry in said.items() if _is(entry, PreTrainedTokenizerBase)
        }
        for part, entry in said.items():
            if part not in parts:
                parts[part] = _part(part, entry, parts) if isinstance(entry, tuple) else entry
        pipeline = family.pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _families() -> list[Family]:
    found = []
    for path in dict.fromkeys(FAMILIES.values()):
        module, _, name = path.rpartition(".")
        found.append(vars(importlib.import_module(module))[name])
    return found


def _is(entry: Any, base: type) -> bool:
    return isinstance(entry, tuple) and isinstance(entry[0], type) and issubclass(entry[0], base)


def _part(name: str, entry: tuple[Any, Mapping[str, Any]], parts: Mapping[str, Any]) -> Any:
    kind, settings = entry
    if _is(entry, PreTrainedModel):
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        settings = settings if tokenizer is None else _with_words(tokenizer, settings)
        return _shaken(kind(kind.config_class(**settings)))
    if _is(entry, ModelMixin):
        return _shaken(kind(**settings))
    if "tokenizer" in settings:  # a processor, which holds the tokenizer of that name, and image processors of its own
        held = {
            key: _part(key, value, parts) if isinstance(value, tuple) else parts[value]
            for key, value in settings.items()
        }
        return kind(**held)
    if issubclass(kind, SchedulerMixin):
        return kind.from_config(settings)  # keeps the entries of the released file that the class itself does not know
    return kind(**settings)


def _with_words(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an encoder, or of the text model in it, with what it must know of its tokenizer."""
    if "text_config" in settings:
        return {**settings, "text_config": _with_words(tokenizer, settings["text_config"])}
    ids = {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return {"vocab_size": len(tokenizer), **{name: i for name, i in ids.items() if i is not None}, **settings}


@torch.no_grad()
def _shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode with every weight moved, and statistics of norms that are not 0 and 1."""
    for parameter in network.parameters():
        parameter.add_(SHAKE * torch.randn_like(parameter))
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network.eval()
