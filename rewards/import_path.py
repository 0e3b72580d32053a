"""Objects by name: `./my_parts.py:Mine` of a file, `package.module:Mine` or `package.module.Mine` of an importable module."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def split_path(path: str) -> tuple[str, str]:
    """(file or module, name in it) of a path such as `./my_parts.py:Mine` or `package.module.Mine`."""
    place, _, attribute = path.rpartition(":" if ":" in path else ".")
    is_module = all(name.isidentifier() for name in place.split("."))
    if not attribute.isidentifier() or not (is_module or (place.endswith(".py") and ":" in path)) or attribute == "py":
        raise ValueError(
            f"got path {path!r}; expected './my_file.py:name', 'package.module:name' or 'package.module.name'"
        )
    return place, attribute


def check_file(path: str) -> None:
    """ValueError if `path` names an object of a file that is not there; relative to the working directory."""
    place, _ = split_path(path)
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise ValueError(
            f"got {path!r}, but there is no file {Path(place).expanduser().absolute()}; expected it to exist"
        )


def import_named(path: str) -> Any:
    """The object behind a path. A file is run once, and again after it has changed. ValueError with near matches if it, or
    its module, is not there; what the module itself raises passes."""
    check_file(path)
    place, attribute = split_path(path)
    module = _import_file(place) if place.endswith(".py") else _import_module(path, place)
    try:
        return getattr(module, attribute)  # not vars: a module may make its names on demand, as flowalign does
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        has = f"; {place} has {near(attribute, own)}" if own else _guess(attribute, list(vars(module)))
        raise ValueError(f"got {path!r}: {attribute!r} does not exist{has}") from error


def path_of(kind: type) -> str:
    """The path by which `import_named` finds the class again, in another process too. ValueError if there is none."""
    module = sys.modules[kind.__module__]
    file = vars(module).get("__file__")
    place = kind.__module__
    if file is not None and place == _module_name(Path(file)):
        place = file
    if place == "__main__" or "." in kind.__qualname__ or vars(module).get(kind.__qualname__) is not kind:
        raise ValueError(
            f"got {kind.__qualname__}, which no other process can import from {place}; expected a class at the top of a "
            "module or file: move it there"
        )
    return f"{place}:{kind.__qualname__}"


def near(name: str, known: Iterable[str]) -> str:
    """The known names with a guess, for messages: `a, b (did you mean 'a'?)`."""
    known = list(known)
    return (", ".join(known) or "none") + _guess(name, known)


def _guess(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _import_file(place: str) -> ModuleType:
    file = Path(place).expanduser().absolute()
    state = file.stat()
    return _run_file(file, state.st_mtime_ns, state.st_size)


@cache
def _run_file(file: Path, changed: int, size: int) -> ModuleType:
    """One module per state of a file, so that a class is the same object wherever it is named."""
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def _module_name(file: Path) -> str:
    """Of equal file names in two folders, one each."""
    return f"{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"


def _import_module(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        parent, _, last = error.name.rpartition(".")
        folders = vars(sys.modules[parent]).get("__path__", []) if parent else None  # None: all of sys.path
        raise ValueError(
            f"got {path!r}: no module {error.name!r}{_guess(last, [each.name for each in iter_modules(folders)])}; "
            f"for a file in the working directory write './file.py:{split_path(path)[1]}'"
        ) from error
