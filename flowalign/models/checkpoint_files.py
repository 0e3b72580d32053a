"""Checks the files of a diffusers pipeline folder before any weight is read: what is missing, damaged or of another model is
named by its path. Files on the hub are left to diffusers."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

INDEX = "model_index.json"
# library in model_index.json -> its weight files, the first that is there is read, and the file for which they stand
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
PICKLES = {"diffusers": "diffusion_pytorch_model.bin", "transformers": "pytorch_model.bin"}
FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming it if it is not there, no JSON, or no object."""
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"got {found} at {file}, {what}; expected a JSON file: save the pipeline anew")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # of the text's encoding or of the JSON
        raise ValueError(
            f"got {file}, {what}, which is no JSON ({error}); expected the file as save_pretrained writes it: copy or "
            "download it anew"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"got {file}, {what}, with a {type(content).__name__}; expected a JSON object: save it anew")
    return content


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder; ValueError if that is no pipeline folder."""
    if not folder.is_dir():
        raise ValueError(
            f"got policy.path={str(folder)!r}, a file; expected a diffusers pipeline folder, as pipe.save_pretrained writes it"
        )
    if not (folder / INDEX).exists():
        raise ValueError(
            f"got policy.path={str(folder)!r} without a {INDEX}; expected a diffusers pipeline folder: save one with "
            "pipe.save_pretrained"
        )
    return read_json(folder / INDEX, "the list of a pipeline's parts")


def check_files(
    folder: Path,
    index: Mapping[str, Any],
    networks: Mapping[str, Any],
    required: Collection[str],
    absent: Collection[str],
) -> None:
    """ValueError that names the first file of a pipeline folder which is missing, damaged or of another model.

    networks: diffusers class of each trained component. required: components that the pipeline cannot be without. absent:
    those that are not loaded. Read are configurations, tokenizers and the headers of safetensors files; shapes are those that
    an empty model of the configuration has."""
    for name in required:
        if not isinstance(index.get(name), list) or len(index[name]) != 2 or index[name][0] is None:
            raise ValueError(
                f"got {folder / INDEX} with {name}={index.get(name)}; expected the library and class of the pipeline's {name}: save "
                "the whole pipeline"
            )
    for name, kind in networks.items():
        if index[name][1] != kind.__name__:
            raise ValueError(
                f"got {folder / INDEX} with {name}={index.get(name)}; expected a {kind.__name__}, which this family trains"
            )
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None or name in absent:
            continue
        place, (library, kind) = folder / name, entry
        if not place.is_dir():
            found = "a file" if place.exists() else "nothing"
            raise ValueError(
                f"got {found} at {place}; expected the folder of the pipeline's {name} ({kind}), which {INDEX} names: save the "
                "whole pipeline, or copy that folder"
            )
        if "Tokenizer" in kind:
            _check_tokenizer(place)
        elif "Processor" in kind:
            _check_json(place, f"a part of the {name}")
        elif "Scheduler" in kind:
            read_json(place / "scheduler_config.json", f"the configuration of the {name}")
        elif library in WEIGHTS:
            _check_weights(place, name, library, kind)


def _check_json(place: Path, what: str) -> None:
    for file in sorted(place.glob("*.json")):
        read_json(file, what)


def _check_tokenizer(place: Path) -> None:
    _check_json(place, "a part of the tokenizer")
    has = {file.name for file in place.iterdir() if file.is_file() and file.stat().st_size}
    if not (has & {"tokenizer.json", "spiece.model", "tokenizer.model"} or {"vocab.json", "merges.txt"} <= has):
        raise ValueError(
            f"got {place} with {', '.join(sorted(has)) or 'no file'}; expected tokenizer.json, or vocab.json and merges.txt: copy "
            "the tokenizer anew"
        )


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _check_weights(place: Path, name: str, library: str, kind: str) -> None:
    config = read_json(place / "config.json", f"the configuration of the {name}")
    if library == "diffusers" and config.get("_class_name") != kind:
        raise ValueError(
            f"got {place / 'config.json'} of a {config.get('_class_name')}; expected a {kind}, as {INDEX} says: copy the folder "
            "of this pipeline's own model"
        )
    if (place / PICKLES[library]).is_file() and not (place / WEIGHTS[library]).exists():
        return  # not safetensors: nothing can be told without reading it
    entries = {key: entry for file in _files(place, name, library) for key, entry in _header(file)}
    if "quantization_config" not in config:  # its tensors are packed
        _check_tensors(place, kind, entries, _wanted(place, library, kind, config))


def _files(place: Path, name: str, library: str) -> list[Path]:
    """The safetensors files of a component: one, or those of its index, which must all be there."""
    whole, shards = place / WEIGHTS[library], place / f"{WEIGHTS[library]}.index.json"
    if whole.exists():
        return [whole]
    if not shards.exists():
        raise ValueError(
            f"got {place} without weights; expected {whole.name}, or {shards.name} with its shards: download or save the {name} anew"
        )
    listed = read_json(shards, f"the list of the {name}'s shards").get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"got {shards} without a weight_map; expected one from tensor to file: download it anew")
    return [place / file for file in sorted(set(listed.values()))]


def _header(file: Path) -> Iterator[tuple[str, _Entry]]:
    if not file.is_file():
        raise ValueError(
            f"got {'a folder' if file.is_dir() else 'no file'} at {file}; expected weights: download it anew"
        )
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(key)
                yield key, _Entry(file, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size:,} bytes"
        raise ValueError(
            f"got {file} of {size}, which is damaged ({error}); expected whole weights: download or copy it anew"
        ) from error


@lru_cache(maxsize=32)
def _shapes(library: str, kind: str, config: str) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a component, from its configuration as JSON; what is tied to another is left out."""
    cls, settings = getattr(importlib.import_module(library), kind), json.loads(config)
    with torch.device("meta"):
        model = cls.from_config(settings) if library == "diffusers" else cls(cls.config_class.from_dict(settings))
    tied = set(getattr(model, "_tied_weights_keys", None) or ())  # of transformers
    return {key: tuple(tensor.shape) for key, tensor in model.named_parameters() if key not in tied}


def _wanted(place: Path, library: str, kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        return _shapes(library, kind, json.dumps(config))
    except Exception as error:  # whatever a class makes of settings that are not its own
        raise ValueError(
            f"got {place / 'config.json'}, of which no {kind} can be made ({type(error).__name__}: {error}); expected the file as "
            "it was released: copy it anew"
        ) from error


def _check_tensors(
    place: Path, kind: str, entries: Mapping[str, _Entry], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError for a tensor that the model has and no file holds, or holds in another shape or as integers.

    Older files name some tensors otherwise and the libraries translate: a tensor that is not found by its name counts as
    there if an unknown one of as many elements is left over. Not kept: two of equal size that are swapped."""
    for key, shape in wanted.items():
        if key in entries and (entries[key].shape != shape or entries[key].dtype not in FLOATS):
            entry = entries[key]
            raise ValueError(
                f"got {entry.file} with {key} of {entry.dtype} {list(entry.shape)}; expected {list(shape)} of one of "
                f"{', '.join(FLOATS)}, as {place / 'config.json'} says: both must be of one model"
            )
    spare = Counter(prod(entry.shape) for key, entry in entries.items() if key not in wanted)
    for key, shape in wanted.items():
        if key in entries:
            continue
        if not spare[prod(shape)]:
            raise ValueError(
                f"got the weights in {place} without {key} {list(shape)}; expected every tensor of the {kind} that config.json "
                "describes: download or save them anew"
            )
        spare[prod(shape)] -= 1


def check_finite(folder: str, parts: Mapping[str, Any]) -> None:
    """ValueError that names a loaded component with a weight that is NaN or infinite."""
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            continue
        for key, tensor in part.named_parameters():
            if bad := tensor.numel() - int(tensor.detach().isfinite().sum()):
                raise ValueError(
                    f"got policy.path={folder!r} whose {name} has {bad} of {tensor.numel()} values of {key} that are NaN or "
                    "infinite; expected finite weights: save or download the model anew, in bf16 or fp32 if fp16 overflowed"
                )
