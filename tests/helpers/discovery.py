"""Finds the dataclasses of a package, and builds one of each."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from inspect import isfunction, signature
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def dataclasses_of(package: ModuleType, member: str) -> dict[str, type]:
    """Name -> dataclass, of all that are defined in a module of `package` (or in it) and have `member`."""
    modules = [package, *(import_module(f"{package.__name__}.{info.name}") for info in iter_modules(_folders(package)))]
    return {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__ and has(kind, member)
    }


def has(kind: type, member: str) -> bool:
    """Whether objects of the dataclass `kind` have it: a method, a property, a class attribute or a field."""
    return member in {entry.name for entry in fields(kind)} or any(member in vars(base) for base in kind.__mro__)


def members_of(protocol: type) -> list[str]:
    """The members that a Protocol declares, in order."""
    return [name for name in vars(protocol) if not name.startswith("_") or name == "__call__"]


def differences(kind: type, protocol: type) -> list[str]:
    """What `kind` lacks of a Protocol, or takes with other arguments than it."""
    found = [f"no {name}" for name in members_of(protocol) if not has(kind, name)]
    for name in members_of(protocol):
        own = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        if isfunction(own) and isfunction(vars(protocol)[name]):
            got, expected = (list(signature(function).parameters)[1:] for function in (own, vars(protocol)[name]))
            if got != expected:
                found.append(f"{name}({', '.join(got)}) in place of {name}({', '.join(expected)})")
    return found


def example(kind: type, examples: Mapping[str, Mapping[str, Any]]) -> Any:
    """An object of `kind`, by its defaults and by its entry of `examples`. AssertionError if arguments are missing."""
    given = examples.get(kind.__name__, {})
    missing = [
        entry.name
        for entry in fields(kind)
        if entry.init and entry.default is MISSING and entry.default_factory is MISSING and entry.name not in given
    ]
    assert not missing, (
        f"{kind.__name__} cannot be built: no example for {missing}; expected defaults, or an entry "
        f"'{kind.__name__}': {{{', '.join(f'{name!r}: ...' for name in missing)}}} in EXAMPLES of this test"
    )
    return kind(**given)


def _folders(package: ModuleType) -> list[str]:
    return list(vars(package).get("__path__", []))
