"""The parts of a folder, found by walking it: what the conformance tests run over."""

import inspect
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.discovery import dataclasses_of


def classes_with(package: ModuleType, method: str) -> list[type]:
    """The dataclasses defined anywhere in `package` that have `method`, by name."""
    return sorted(dataclasses_of(package, method).values(), key=lambda cls: cls.__name__)


def example(cls: type, table: dict[str, Any], place: str) -> Any:
    """That of `table`, else the class with its defaults; fails if it has arguments without one."""
    if cls.__name__ in table:
        return table[cls.__name__]
    required = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if required:
        pytest.fail(f"{cls.__name__} needs {', '.join(required)}: add an example of it to EXAMPLES in {place}")
    return cls()


def check_final(cls: type, protocol: type, package: ModuleType) -> None:
    """A frozen dataclass that inherits from nothing, has every member of its Protocol, and is public."""
    assert cls.__bases__ == (object,), f"{cls.__name__} inherits from {cls.__bases__}; expected a final class"
    assert cls.__dataclass_params__.frozen, f"{cls.__name__} is not frozen"
    members = [name for name in vars(protocol) if not name.startswith("_")]
    missing = [name for name in members if not hasattr(cls, name)]
    assert not missing, f"{cls.__name__} lacks {missing} of {protocol.__name__}"
    assert cls.__name__ in package.__all__, f"{cls.__name__} is missing in {package.__name__}.__all__"
    for name in members:
        ours, theirs = (inspect.getattr_static(owner, name) for owner in (cls, protocol))
        if inspect.isfunction(ours) and inspect.isfunction(theirs):
            names = [list(inspect.signature(function).parameters)[1:] for function in (ours, theirs)]
            assert names[0] == names[1], f"{cls.__name__}.{name}{names[0]}: expected the arguments {names[1]}"


def check_all_found(package: ModuleType, found: list[type]) -> None:
    """A public dataclass with public methods of its own is a part: one that misspells its method must not slip through."""
    for name in package.__all__:
        cls = getattr(package, name)
        if is_dataclass(cls) and any(inspect.isfunction(v) for k, v in vars(cls).items() if not k.startswith("_")):
            assert cls in found, f"{name} has methods, but not that of the Protocol of {package.__name__}"
