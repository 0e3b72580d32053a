"""A forest on disk: safetensors with a JSON header. Nothing is pickled; no class outside samplers is ever imported."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from samplers.forest import Forest, Held
from samplers.kernels.base import Kernel
from samplers.trees import Tree

_COLUMNS = ("sigmas", "states", "row", "log_prob")


def save_forest(path: Path, forest: Forest) -> None:
    """Writes `forest` beside `path`, then renames it into place.

    The kernel is written as its import path and its fields. A kernel that holds what JSON cannot (a reward, a network)
    is written by name only, and must be passed to `load_forest`.
    """
    tree = {entry.name: vars(forest.tree)[entry.name] for entry in fields(forest.tree)}
    tensors = {name: vars(forest)[name] for name in _COLUMNS}
    tensors |= {f"tree/{name}": value for name, value in tree.items() if isinstance(value, Tensor)}
    tensors |= {f"scores/{name}": value for name, value in forest.scores.items()}
    for role, known in forest.velocities.items():
        tensors |= {f"velocities/{role}/row": known.row, f"velocities/{role}/values": known.values}
    header = {
        "tree": {name: value for name, value in tree.items() if not isinstance(value, Tensor)},
        "kernel": _describe(forest.kernel),
        "evaluations": forest.evaluations,
        "previews": forest.previews,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"forest": json.dumps(header)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_forest(path: Path, kernel: Kernel | None = None) -> Forest:
    """Reads what `save_forest` wrote, onto the CPU, bit for bit.

    A kernel of samplers is rebuilt from its fields; any other must be passed in, and must be the one that rolled out.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(file.metadata()["forest"])
    roles = {name.rpartition("/")[0] for name in _under("velocities/", tensors)}
    return Forest(
        tree=Tree(**{**_under("tree/", tensors), **header["tree"]}),
        kernel=_rebuild(header["kernel"], kernel),
        evaluations=header["evaluations"],
        previews=header["previews"],
        velocities={role: Held(**_under(f"velocities/{role}/", tensors)) for role in sorted(roles)},
        scores=_under("scores/", tensors),
        **{name: tensors[name] for name in _COLUMNS},
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _describe(value: Any) -> Any:
    """A dataclass as {"class", "fields"}, fields None where JSON cannot hold them; a tensor as {"dtype", "values"}."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if not is_dataclass(value):
        return value
    kind = type(value)
    content: dict[str, Any] | None = {entry.name: _describe(vars(value)[entry.name]) for entry in fields(value)}
    try:
        content = json.loads(json.dumps(content))
    except TypeError:
        content = None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "fields": content}


def _rebuild(description: dict[str, Any], given: Kernel | None) -> Kernel:
    """The kernel of the file; `given` must have the same description."""
    if given is not None:
        if _describe(given) != description:
            raise ValueError(f"got the kernel {_describe(given)}; expected {description}, which rolled this forest out")
        return given
    if description["fields"] is None or not description["class"].startswith("samplers."):
        raise ValueError(
            f"got a forest of {description['class']}, which is not rebuilt from a file; expected the kernel that rolled it "
            "out: pass kernel="
        )
    kernel: Kernel = _build(description)
    return kernel


def _build(description: Any) -> Any:
    """The object that `_describe` described; only tensors and dataclasses of samplers; lists become tuples again."""
    if isinstance(description, list):
        return tuple(_build(item) for item in description)
    if not isinstance(description, dict):
        return description
    if set(description) == {"dtype", "values"}:
        return torch.tensor(description["values"], dtype=vars(torch)[description["dtype"]])
    module, _, name = str(description["class"]).rpartition(".")
    if not module.startswith("samplers.") or description["fields"] is None:
        raise ValueError(
            f"got a kernel that holds {description['class']}, which is not rebuilt from a file; expected the kernel that "
            "rolled this forest out: pass kernel="
        )
    kind = vars(import_module(module)).get(name)
    if not isinstance(kind, type) or not is_dataclass(kind) or kind.__module__ != module:
        raise ValueError(
            f"got {description['class']}, which is not a kernel of samplers; expected a dataclass of its own module: the "
            "file is damaged or of another version"
        )
    return kind(**{key: _build(value) for key, value in description["fields"].items()})
