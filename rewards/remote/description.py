"""A reward as JSON and back: its class path and arguments. So that another process can build it, without pickles."""

from __future__ import annotations

import inspect
import json
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch

from rewards.base import Reward
from rewards.import_path import import_named, path_of

# where or how a reward is asked does not change its scores
AROUND = (
    "rewards.remote.in_worker:InWorker",
    "rewards.remote.client:Http",
    "rewards.with_timeout:WithTimeout",
    "rewards.offloaded:Offloaded",
)


def describe(reward: Reward) -> dict[str, Any]:
    """{"class_path", "init_args"} of a reward that keeps its arguments under their names (as dataclasses do), and so on for
    the parts in it; plain JSON. Not kept: what else the object holds.

    ValueError for what JSON cannot say: a function given as an object, a network."""
    return cast(dict[str, Any], _described(reward, type(reward).__name__))


def build(description: dict[str, Any]) -> Reward:
    """What `describe` described. It runs the constructors that it names: for descriptions of one's own process only."""
    return cast(Reward, _built(description))


def fingerprint(reward: Reward) -> str:
    """16 hex digits of its class and arguments, and of the file if the class, or a function among them, is from one; the same in a worker, behind a
    server or with a timeout. Not kept: a change of its code or weights under the same names."""
    bare = _bare(describe(reward))
    return sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()[:16]


def _described(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_described(each, f"{where}[{i}]") for i, each in enumerate(value)]}
    if isinstance(value, list):
        return [_described(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(each, f"{where}[{key!r}]") for key, each in value.items()}}
    if (own := _arguments(value)) is not None:
        arguments = {name: _described(each, f"{where}.{name}") for name, each in own.items()}
        return {"class_path": path_of(type(value)), "init_args": arguments}
    raise ValueError(
        f"got {where}={str(value)[:80]} ({type(value).__name__}); expected what another process can build: texts, numbers, "
        "bools, null, and lists, mappings and objects of them that keep their arguments under their names, as dataclasses do; "
        "a function goes as its path, './my_rewards.py:shininess'"
    )


def _arguments(value: Any) -> dict[str, Any] | None:
    """Of an object that keeps them under the names of its constructor's parameters; else None. Networks do not: they hold
    weights beside them."""
    if isinstance(value, torch.nn.Module):
        return None
    try:
        parameters, kept = inspect.signature(type(value)).parameters.values(), vars(value)
    except (TypeError, ValueError):  # of C code
        return None
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) or each.name not in kept for each in parameters):
        return None
    return {each.name: kept[each.name] for each in parameters}


def _built(value: Any) -> Any:
    if isinstance(value, list):
        return [_built(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "path" in value:
        return Path(value["path"])
    if "tuple" in value:
        return tuple(_built(each) for each in value["tuple"])
    if "dict" in value:
        return {key: _built(each) for key, each in value["dict"].items()}
    arguments = {name: _built(each) for name, each in value["init_args"].items()}
    return import_named(value["class_path"])(**arguments)


def _bare(value: Any) -> Any:
    """A description without what is around rewards, and with the content of files in the place of their folder."""
    if isinstance(value, list):
        return [_bare(each) for each in value]
    if isinstance(value, str):
        return _content(value)
    if not isinstance(value, dict):
        return value
    if value.get("class_path") in AROUND:
        return _bare(value["init_args"]["reward"])
    return {key: _bare(each) for key, each in value.items()}


def _content(text: str) -> str:
    """Of a path `file.py:name`, a class or a function, the file's hash in the place of the file; other texts as they are."""
    place, _, name = text.rpartition(":")
    file = Path(place).expanduser()
    if not place.endswith(".py") or not name.isidentifier() or not file.is_file():
        return text
    return f"{sha256(file.read_bytes()).hexdigest()}:{name}"
