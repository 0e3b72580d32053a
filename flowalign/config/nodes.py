"""Checks a whole configuration, as YAML nodes, against the types of what it makes, before the parser sees it: every key by its
full dotted name."""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Any

import yaml

from flowalign.config.contracts import HOMES, differences
from flowalign.config.layers import as_part, class_path_of, entries_of, is_null, is_text
from flowalign.config.parser import import_part
from flowalign.config.placement import placed
from flowalign.config.types import ANYTHING, NO_DEFAULT, Parameter, guess, parameters
from flowalign.errors import ConfigError
from rewards import Reward


def checked(node: yaml.Node, kind: Parameter, key: str = "") -> yaml.Node:
    """The node as the parser gets it: without the names of a mapping that are null, and with text where text belongs.

    ConfigError for an unknown or missing key, for null where there is no "none", for a part that does not exist or does not
    satisfy its contract, and for a number that is not finite (a part's own default may be infinite)."""
    if is_null(node):
        if not kind.may_be_null:
            raise ConfigError(
                f"got {key}=null; expected {_said(kind)}: leave the key out for its default, if it has one"
            )
        return node
    if kind.contract is not None:
        return _part(node, kind, kind.contract, key)
    if kind.section is not None:
        names = parameters(kind.section)
        assert names is not None  # ours take no **kwargs
        return _named(_mapping(node, kind, key), names, key)
    if isinstance(node, yaml.SequenceNode):
        each = kind.members or ANYTHING
        values = [checked(value, each, f"{key}[{number}]") for number, value in enumerate(node.value)]
        return yaml.SequenceNode(node.tag, values, node.start_mark, node.end_mark)
    if isinstance(node, yaml.MappingNode):
        each = kind.members or ANYTHING
        if kind.keys is str and (numbers := [name.value for name, _ in node.value if name.tag.endswith(":int")]):
            raise ConfigError(f"got {key} with the key {numbers[0]}, a number; expected text: write it in quotes")
        pairs = [(name, value) for name, value in node.value if not is_null(value) or each.may_be_null]
        checked_pairs = [(name, checked(value, each, f"{key}.{name.value}")) for name, value in pairs]
        return yaml.MappingNode(node.tag, checked_pairs, node.start_mark, node.end_mark)
    assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
    return _scalar(node, kind, key)


def _named(node: yaml.MappingNode, names: dict[str, Parameter], key: str, of: str = "") -> yaml.MappingNode:
    """Its values checked, each as the parameter of its name. of: whose they are, for messages."""
    entries, dot = entries_of(node), f"{key}." if key else ""
    for name in entries:
        if name not in names:
            raise ConfigError(
                f"unknown key {dot + name!r}:{guess(name, names, dot)} Allowed here: {', '.join(sorted(names))}{of}"
            )
    for name, kind in names.items():
        if kind.default is NO_DEFAULT and name not in entries:
            raise ConfigError(f"{dot}{name} is missing; expected {_said(kind)}")
    pairs = [(name, checked(value, names[name.value], dot + name.value)) for name, value in entries.values()]
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _part(node: yaml.Node, kind: Parameter, contract: type, key: str) -> yaml.MappingNode:
    """A part: its class is there and satisfies the contract, its arguments are checked."""
    part = as_part(node) if is_text(node) else _mapping(node, kind, key)
    if contract is Reward:
        part = placed(part, key, lambda bare: _part(bare, kind, contract, key))
    entries = entries_of(part)
    for name in entries:
        if name not in ("class_path", "init_args"):
            raise ConfigError(
                f"unknown key {f'{key}.{name}'!r}: a part has class_path and init_args (a reward also "
                "place); write its arguments under init_args"
            )
    if "class_path" in entries and not isinstance(entries["class_path"][1], yaml.ScalarNode):
        raise ConfigError(f"got {key} with a class_path of several values; expected the name of one class")
    path, default = class_path_of(part), None if kind.default is NO_DEFAULT else kind.default
    if path is None and default is None:
        raise ConfigError(f"got {key} without a class_path; expected {_said(kind)}")
    made_by = type(default) if path is None else _found(path, contract, key)
    empty = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
    given = entries["init_args"][1] if "init_args" in entries else empty
    # init_args may be null: all of them commented out
    arguments = empty if is_null(given) else _mapping(given, Parameter(dict[str, Any]), f"{key}.init_args")
    names = parameters(made_by)
    inner = (
        checked(arguments, Parameter(dict[str, Any]), key)
        if names is None
        else _named(arguments, names, key, f" (arguments of {path or made_by.__name__})")
    )
    if "init_args" not in entries:
        return part
    pairs = [entry for name, entry in entries.items() if name == "class_path"]
    return yaml.MappingNode(part.tag, [*pairs, (entries["init_args"][0], inner)], node.start_mark, node.end_mark)


def _found(path: str, contract: type, key: str) -> Any:
    """What the class_path of a part names."""
    try:
        found = import_part(path)
    except ValueError as error:
        raise ConfigError(
            f"{key}: {error}{'' if 'did you mean' in str(error) else _near_part(path, contract)}"
        ) from error
    if not inspect.isclass(found):  # what makes a FunctionReward
        if contract is not Reward:
            raise ConfigError(f"got {key}={path!r}, a function; expected a class that is {_a(contract)}")
    elif vars(found).get("_is_protocol"):
        raise ConfigError(f"got {key}={path!r}, which is a contract; expected a class that satisfies it")
    elif differs := differences(found, contract):
        raise ConfigError(f"got {key}={path!r}; expected {_a(contract)}: {'; '.join(differs)}")
    return found


def _near_part(path: str, contract: type) -> str:
    """A guess which of our parts was meant, by the last part of its name."""
    known = {
        name: f"{home.__name__}.{name}" for home in HOMES for name in vars(home).get("__all__", ())
        if inspect.isclass(vars(home)[name]) and not differences(vars(home)[name], contract)
    }  # fmt: skip
    near = difflib.get_close_matches(path.rpartition(".")[2], list(known), n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def _mapping(node: yaml.Node, kind: Parameter, key: str) -> yaml.MappingNode:
    if isinstance(node, yaml.MappingNode):
        return node
    got = f"={node.value!r}" if isinstance(node, yaml.ScalarNode) else ", a list"
    raise ConfigError(f"got {key}{got}; expected {_said(kind)}")


def _scalar(node: yaml.ScalarNode, kind: Parameter, key: str) -> yaml.ScalarNode:
    """Text is text even where YAML would read a number (run.name=2024); a number has a size."""
    if str in kind.kinds:
        return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark, style='"')
    if ":" in node.value and node.tag.endswith((":int", ":float")):
        raise ConfigError(
            f"got {key}={node.value}, which YAML reads as a number to the base 60; expected a number, or quotes"
        )
    value = _number(node, float in kind.kinds)
    default = kind.default if isinstance(kind.default, tuple | list) else (kind.default,)
    if node.tag.endswith(":int") and abs(value) >= 2**63:
        raise ConfigError(f"got {key}={node.value:.40}; expected a whole number below 2**63")
    if not math.isfinite(value) and value not in default:
        raise ConfigError(f"got {key}={node.value}; expected a finite number")
    return node


def _number(node: yaml.ScalarNode, may_be_float: bool) -> float:
    """What a scalar stands for, also where only the parser and not YAML reads a number (1e999); 0 for what is none."""
    try:
        if node.tag.endswith((":int", ":float")) and len(node.value) < 100:
            return float(yaml.safe_load(node.value))
        return float(node.value) if may_be_float or node.tag.endswith(":int") else 0.0
    except (ValueError, OverflowError):
        return math.inf if node.tag.endswith(":int") else 0.0


def _said(kind: Parameter) -> str:
    """What may stand there, for messages."""
    if kind.contract is not None:
        return f"{_a(kind.contract)}: class_path, './file.py:Class' or 'package.module.Class', and init_args"
    if kind.section is not None:
        return f"a mapping with some of {', '.join(sorted(parameters(kind.section) or ()))}"
    if kind.members:
        return "a mapping" if kind.keys else "a list"
    return " or ".join(
        kind.__name__ if inspect.isclass(kind) else str(kind).rpartition("typing.")[2] for kind in kind.kinds
    )


def _a(contract: type) -> str:
    return f"{'an' if contract.__name__[0] in 'AEIOU' else 'a'} {contract.__name__}"
