"""What may stand at a key of a configuration: read from the parameters of the class that it makes."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

NO_DEFAULT = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """hint: its type, Any if it is not known. default: NO_DEFAULT if it has to be given."""

    hint: Any = Any
    default: Any = NO_DEFAULT

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of which it may be, without None."""
        return tuple(kind for kind in _alternatives(self.hint) if kind is not type(None))

    @property
    def may_be_null(self) -> bool:
        return self.hint is Any or type(None) in _alternatives(self.hint)

    @property
    def contract(self) -> type | None:
        """The Protocol that the part of this parameter satisfies; None if it is no part."""
        return next((kind for kind in self.kinds if inspect.isclass(kind) and vars(kind).get("_is_protocol")), None)

    @property
    def section(self) -> type | None:
        """The class whose parameters are its keys, such as RunSettings; None if it is no section."""
        plain = next((kind for kind in self.kinds if inspect.isclass(kind) and is_dataclass(kind)), None)
        return None if self.contract else plain

    @property
    def members(self) -> Parameter | None:
        """Of a list, a tuple or a mapping: what its members may be; else None."""
        holder = next((kind for kind in self.kinds if get_origin(kind) in (list, tuple, dict)), None)
        if holder is None:
            return None
        inner = [kind for kind in get_args(holder) if kind is not Ellipsis]
        return Parameter(inner[-1] if get_origin(holder) is dict or len(set(inner)) == 1 else Any)

    @property
    def keys(self) -> type | None:
        """Of a mapping: the type of its keys, str or int; else None."""
        return next((get_args(kind)[0] for kind in self.kinds if get_origin(kind) is dict), None)


ANYTHING = Parameter()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def parameters(made_by: Any) -> dict[str, Parameter] | None:
    """Of a class or a function, by name; None if it takes any."""
    return _parameters(made_by)


@cache
def _parameters(made_by: Any) -> dict[str, Parameter] | None:
    try:
        hints = get_type_hints(vars(made_by).get("__init__", made_by) if inspect.isclass(made_by) else made_by)
    except NameError:  # annotations that only a type checker can read
        hints = {}
    signature = inspect.signature(made_by).parameters
    if any(each.kind is each.VAR_KEYWORD for each in signature.values()):
        return None
    made = {}
    if inspect.isclass(made_by) and is_dataclass(made_by):
        made = {each.name: each.default_factory for each in fields(made_by) if each.default_factory is not MISSING}
    return {
        name: Parameter(hints.get(name, Any), made[name]() if name in made else each.default)
        for name, each in signature.items()
        if each.kind is not each.VAR_POSITIONAL
    }


def guess(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ " did you mean 'x'?", or nothing; prefix: what stands before the known names."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" did you mean {prefix + near[0]!r}?" if near else ""
