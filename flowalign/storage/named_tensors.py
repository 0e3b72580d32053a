"""Parameters and optimizer state as tensors keyed by parameter name: what a checkpoint holds of a training run.

Keyed by name and not by position, so that a change in the order of parameters cannot hand one the moments of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from flowalign.storage.checkpoint import CheckpointError, State, Tensors
from flowalign.storage.sharded import sharded_as

Named = Iterable[tuple[str, Parameter]]


def check_same_names(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless `found` (of a checkpoint) has the names, shapes and dtypes of `expected`."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{what}: the checkpoint lacks {_some(missing)} and holds unknown {_some(unknown)}; "
            "resume with the configuration that wrote it (model, LoRA targets, trainable parts)"
        )
    for name, tensor in expected.items():
        here, there = (tuple(tensor.shape), tensor.dtype), (tuple(found[name].shape), found[name].dtype)
        if here != there:
            raise CheckpointError(
                f"{what}: {name} is {there} in the checkpoint, expected {here}; "
                "resume with the configuration that wrote it (LoRA rank, dtype)"
            )


def pack_parameters(named: Named) -> Tensors:
    """The parameters as a checkpoint section."""
    return {name: parameter.detach() for name, parameter in named}


def restore_parameters(named: Named, tensors: Mapping[str, Tensor]) -> None:
    """Copies a section into the parameters, bit for bit; raises CheckpointError, before any copy, on a mismatch."""
    parameters = dict(named)
    check_same_names("parameters", parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sharded_as(parameter, tensors[name]))


def pack_optimizer(optimizer: Optimizer, named: Named) -> tuple[Tensors, State]:
    """A torch optimizer as (section, JSON).

    Tensors are named `exp_avg/<parameter>`; plain numbers of a parameter's state and the hyper-parameters of the
    groups (learning rate included) are JSON. Raises CheckpointError for a parameter without a name, or a state that
    is neither tensor nor number. Sharded tensors stay sharded."""
    names = _names_of(optimizer, named)
    tensors: Tensors = {}
    scalars: dict[str, State] = {}
    for parameter, entries in optimizer.state.items():
        name = names[parameter]
        tensors |= {f"{key}/{name}": value for key, value in entries.items() if isinstance(value, Tensor)}
        scalars[name] = {k: _scalar(name, k, value) for k, value in entries.items() if not isinstance(value, Tensor)}
    groups = [
        {"parameters": sorted(names[p] for p in group["params"]), "hyper": _hyper(group)}
        for group in optimizer.param_groups
    ]
    shapes = {name: list(parameter.shape) for parameter, name in names.items()}
    return tensors, {"type": type(optimizer).__name__, "groups": groups, "shapes": shapes, "scalars": scalars}


def restore_optimizer(
    optimizer: Optimizer,
    named: Named,
    tensors: Mapping[str, Tensor],
    state: State,
    device: torch.device | None = None,
) -> None:
    """Puts what `pack_optimizer` gave into `optimizer`, bit for bit; hyper-parameters become the saved ones. `device`:
    of its tensors, by default that of their parameters.

    Unlike `load_state_dict` it matches by name and casts nothing. Raises CheckpointError, the optimizer untouched,
    naming the parameters that one side lacks, that have another shape or that are in other groups."""
    names = _names_of(optimizer, named)
    if state["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"got a checkpoint of {state['type']}; expected {type(optimizer).__name__}: resume with the optimizer that wrote it"
        )
    here = {name: torch.empty(parameter.shape, device="meta") for parameter, name in names.items()}
    check_same_names("optimizer", here, {n: torch.empty(shape, device="meta") for n, shape in state["shapes"].items()})
    saved = {tuple(group["parameters"]): group["hyper"] for group in state["groups"]}
    members = [tuple(sorted(names[p] for p in group["params"])) for group in optimizer.param_groups]
    for member in members:
        if member not in saved:
            raise CheckpointError(
                f"optimizer: {_some(list(member))} are one parameter group here, but not in the checkpoint; "
                "resume with the configuration that wrote it"
            )
    entries: dict[str, State] = {name: dict(scalars) for name, scalars in state["scalars"].items()}
    for key, tensor in tensors.items():
        entry, _, name = key.partition("/")
        entries[name][entry] = tensor
    optimizer.state.clear()
    for member, group in zip(members, optimizer.param_groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved[member].items()})
        for parameter in group["params"]:
            if names[parameter] in entries:
                optimizer.state[parameter] = _copied(
                    entries[names[parameter]], parameter, device or parameter.device, group
                )


def _copied(entries: State, parameter: Tensor, device: torch.device, group: State) -> State:
    """Own copies on `device`, sharded as the parameter is; torch keeps the scalar `step` on the CPU unless fused or capturable."""
    step_device = device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    copies = {
        key: value.to(device if value.ndim else step_device, copy=True) if isinstance(value, Tensor) else value
        for key, value in entries.items()
    }
    return {
        key: sharded_as(parameter, value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in copies.items()
    }


def _names_of(optimizer: Optimizer, named: Named) -> dict[Tensor, str]:
    known: dict[Tensor, str] = {parameter: name for name, parameter in named}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nameless = [tuple(parameter.shape) for parameter in trained if parameter not in known]
    if nameless:
        raise CheckpointError(
            f"got {len(nameless)} optimizer parameters without a name, of shapes {nameless[:3]}; expected names for all: pass "
            "all named parameters of the roles"
        )
    return {parameter: known[parameter] for parameter in trained}


def _hyper(group: State) -> State:
    plain = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    tensors = [key for key, value in plain.items() if isinstance(value, Tensor)]
    if tensors:
        raise CheckpointError(f"got tensors as optimizer hyper-parameters {tensors}; expected plain numbers")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _scalar(name: str, key: str, value: Any) -> Any:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise CheckpointError(
            f"got a {type(value).__name__} as optimizer state {key!r} of {name}; expected a tensor or number"
        )
    return value


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "none"
