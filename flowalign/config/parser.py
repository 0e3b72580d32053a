"""How the configuration parser (jsonargparse) finds parts: rules of ours in the place of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from jsonargparse import _signatures, _typehints

from flowalign.config.contracts import differences
from rewards import FunctionReward
from rewards.base import Input, Scope
from rewards.import_path import import_named

import_dotted = _typehints.import_object


@contextmanager
def own_rules() -> Iterator[None]:
    """A context in which the parser

    * takes a class for a contract if `differences` finds none; by itself it compares annotations, for which `-> None`
      differs from a postponed `-> None`;
    * finds classes as `import_part` does;
    * keeps no argument of a part that another class replaces; by itself it keeps those of the same names;
    * knows the class of a part that is another's default; by itself it would only see the arguments of a dataclass.
    """
    rules: list[tuple[Any, str, Callable[..., Any]]] = [
        (_typehints, "implements_protocol", _satisfies),
        (_typehints, "import_object", import_part),
        (_typehints, "discard_init_args_on_class_path_change", _forget_arguments),
        (_signatures, "is_subclasses_disabled", lambda kind: False),
    ]
    with ExitStack() as stack:
        for module, name, rule in rules:
            stack.enter_context(patch.object(module, name, rule))
        yield


def import_part(name: str, check_path: bool = True) -> Any:
    """The class that a configuration names, `package.module.Class` or `./file.py:Class`; of a function, what makes a
    FunctionReward of it. ValueError for what is neither, or for a file that cannot be imported."""
    found = import_object(name, check_path)
    if inspect.isclass(found):
        return found
    if not callable(found):
        raise ValueError(f"got {name!r}, of type {type(found).__name__}; expected a class, or a function for a reward")
    return _reward_of(name)


def import_object(name: str, check_path: bool = True) -> Any:
    """What stands behind the name of a part. ValueError if it is not there, or if importing its module fails. check_path:
    False for a name that the parser found in code."""
    if not check_path:
        return import_dotted(name, check_path)
    try:
        return import_named(name)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"got {name!r}, but importing it raised {type(error).__name__}: {error}") from error


@cache
def _reward_of(path: str) -> Callable[..., FunctionReward]:
    """The FunctionReward of a function, with all arguments but the path."""

    def make(
        name: str = "", channels: tuple[str, ...] = (), inputs: tuple[Input, ...] = ("images",), scope: Scope = "terminal",
        differentiable: bool = False,
    ) -> FunctionReward:  # fmt: skip
        return FunctionReward(path, name, channels, inputs, scope, differentiable)

    return make


def _satisfies(value: Any, contract: type) -> bool:
    return inspect.isclass(value) and value is not object and not differences(value, contract)


def _forget_arguments(parser: Any, former: Any, later: Any) -> None:
    """Of another class; what is left of `former` goes under the arguments of `later`."""
    if former and "init_args" in former and former["class_path"] != later["class_path"]:
        for key in list(former.init_args.keys()):
            former.init_args.pop(key, None)


def explain(message: str) -> str:
    """The configuration parser's message in one sentence, with the full dotted name of the key it is about."""
    keys: list[str] = []
    rest: list[str] = []
    for line in (line.strip() for line in message.strip().splitlines()):
        if found := re.fullmatch(r'Parser key "([^"]+)".*:', line):
            keys.append(found[1])
        elif not re.fullmatch(r"Problem with given class_path .*:", line):
            rest.append(line)
    key, text = ".".join(keys), " ".join(rest)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    if found := re.fullmatch(r"Expected an? (.*?)\. Got value: (.*)", text):
        return f"got {key}={found[2]}; expected {found[1].removeprefix('typing.')}"
    if found := re.fullmatch(
        r".* Errors:((?: - Expected an? [^-]+)+) Given value type: \w+ Given value: (.*)", text
    ):  # of a union
        kinds = [kind.strip().removeprefix("typing.") for kind in re.split(r" - Expected an? ", found[1])[1:]]
        return f"got {key}={found[2]}; expected {' or '.join('null' if kind == 'NoneType' else kind for kind in kinds)}"
    return f"{key}: {text}" if key else text
