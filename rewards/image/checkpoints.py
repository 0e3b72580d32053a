"""Finds and reads weights: local, or from the hub's cache. What is missing is an error that says where to get it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def check_place(what: str, place: str | None) -> None:
    """FileNotFoundError for a path (one that begins with `.`, `/` or `~`) that is not there; a hub id is looked up by `load`."""
    if place is not None and place.startswith((".", "/", "~")) and not Path(place).expanduser().exists():
        raise FileNotFoundError(
            f"got {what}={place!r}, which does not exist (working directory: {Path.cwd()}); expected a file, a folder or a hub id"
        )


def find_file(what: str, place: str, file: str) -> Path:
    """`place` itself if it is such a file, else `file` in the folder `place`, else in the hub repository `place`."""
    local = Path(place).expanduser()
    if local.is_file() and local.suffix == Path(file).suffix:
        return local
    if local.exists():
        folder = local if local.is_dir() else local.parent
        if (folder / file).is_file():
            return folder / file
        raise FileNotFoundError(
            f"got {what}={place!r} and no {file} there; expected it: put it into {folder.absolute()}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, file))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"got {what}={place!r}: {file} is neither local nor in the cache of the hub ({_first_line(error)}); expected it in "
            f"one of them: `hf download {place} {file}`, or download https://huggingface.co/{place}/resolve/main/{file} and "
            f"set {what} to the folder"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file or of a torch file, on the CPU. ValueError for a file that holds other objects,
    which would have to be unpickled, or that is damaged."""
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"got {path}, which torch cannot read as plain weights ({_first_line(error)}); expected a state dict: download it "
            "anew"
        ) from error
    return state


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless the tensors of `path` are exactly those of the network, by name and shape."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"got {path}, whose tensors are not those of a {type(network).__name__}: {error}; expected the published file, or "
            "one of the same layout"
        ) from error


def pretrained(kind: Any, what: str, place: str) -> Any:
    """A tokenizer of transformers, from a folder or the hub."""
    with _told_where_to_get(what, place):
        return kind.from_pretrained(os.path.expanduser(place))


def pretrained_network(kind: Any, what: str, place: str, dtype: torch.dtype) -> Any:
    """A network of transformers, from a folder or the hub; ValueError if the checkpoint lacks one of its tensors.

    Tensors that the network does not have (a text tower, say) are left out."""
    with _told_where_to_get(what, place), quiet():
        network, found = kind.from_pretrained(os.path.expanduser(place), dtype=dtype, output_loading_info=True)
    if lacks := sorted(found["missing_keys"]):
        raise ValueError(
            f"got {what}={place!r}, which lacks {len(lacks)} tensors of a {kind.__name__}, the first {lacks[0]!r}; expected all "
            "of them: else they would be random"
        )
    return network


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' table of the tensors that are left out, and its progress bar."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _told_where_to_get(what: str, place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"got {what}={place!r}, which transformers cannot load ({_first_line(error)}); expected a folder, or a hub id that "
            f"is in the cache: `hf download {place}` on a machine with a network, then set {what} to the folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
