"""Whether a class satisfies a contract (a Protocol), and if not, what is missing or differs."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_type_hints

import rewards
import samplers
from flowalign import advantage, credit, objectives, selectors, trainers, truncations
from flowalign.config.types import ANYTHING, Parameter

HOMES: tuple[ModuleType, ...] = (
    rewards, samplers, trainers, credit, advantage, selectors, objectives, truncations,
)  # fmt: skip


def differences(cls: type, contract: type) -> tuple[str, ...]:
    """In a sentence each: what `cls` lacks of the Protocol `contract`, and which methods cannot be called as there."""
    found = []
    for name in _members(contract):
        member = vars(contract)[name]
        if isinstance(member, property):
            continue  # it may be set in __init__: see check_attributes
        if not callable(next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)):
            found.append(f"it has no method `{name}{_text(inspect.signature(member))}`")
        else:
            found += _method_differs(name, cls, member)
    return tuple(found)


def _members(contract: type) -> list[str]:
    """The names of its methods and properties."""
    return [
        name for name, member in vars(contract).items()
        if (not name.startswith("_") or name == "__call__") and (inspect.isfunction(member) or isinstance(member, property))
    ]  # fmt: skip


def check_attributes(part: Any, key: str = "") -> None:
    """ValueError if a part inside the dataclass `part` lacks an attribute of its contract, of which the parser only checks the
    methods. key: where `part` stands in the configuration."""
    if not is_dataclass(part):
        return
    try:
        hints = get_type_hints(type(part))
    except NameError:  # annotations that only a type checker can read
        hints = {}
    for name, value in vars(part).items():
        _check_value(value, Parameter(hints.get(name, Any)), f"{key}.{name}".strip("."))


def _check_value(value: Any, kind: Parameter, key: str) -> None:
    """A part of several contracts (`Plan | Position`) has to satisfy one; where other types are allowed too, none."""
    if isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            _check_value(one, kind.members or ANYTHING, key)
        return
    lacking = [
        (each, _lacks(value, each)) for each in kind.kinds if inspect.isclass(each) and vars(each).get("_is_protocol")
    ]
    if value is not None and lacking and len(lacking) == len(kind.kinds) and all(lacks for _, lacks in lacking):
        contract, lacks = lacking[0]
        raise ValueError(
            f"got {key}={type(value).__name__}, which has no attribute {', '.join(map(repr, lacks))}; expected those "
            f"of {contract.__module__}.{contract.__name__}"
        )
    check_attributes(value, key)


def _lacks(value: Any, contract: type) -> list[str]:
    return [
        name for name in _members(contract) if isinstance(vars(contract)[name], property) and name not in dir(value)
    ]


@cache
def _method_differs(name: str, cls: type, expected: Any) -> tuple[str, ...]:
    wanted, given = inspect.signature(expected), inspect.signature(getattr(cls, name))
    first = () if isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod) else (None,)
    others = list(wanted.parameters.values())[1:]  # without self, under whatever name
    by_name = {p.name: None for p in others if p.kind is p.KEYWORD_ONLY}
    by_place = [p.name for p in others if p.name not in by_name]
    try:
        bound = given.bind(*first, *by_place, **by_name).arguments  # by place; *args, as of a torch.nn.Module, take any
        callable_so = all(value == parameter for parameter, value in bound.items() if isinstance(value, str))
    except TypeError:
        callable_so = False
    if not callable_so:
        return (f"its `{name}{_text(given)}` cannot be called as `{name}{_text(wanted)}`",)
    return ()


def _text(signature: inspect.Signature) -> str:
    return str(signature).replace("'", "")
