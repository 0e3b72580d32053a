"""Overrides `key=value` of the command line, put into the configuration one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from flowalign.config.layers import as_part, class_path_of, entries_of, is_null, is_part, is_text, merge
from flowalign.config.parser import import_part
from flowalign.config.types import ANYTHING, NO_DEFAULT, Parameter, parameters
from flowalign.config.yaml_text import compose
from flowalign.errors import ConfigError
from rewards import Reward


def overridden(node: yaml.Node, override: str, kind: Parameter) -> yaml.Node:
    """The configuration `node` of the type `kind` with one more override, `node` unchanged.

    A value replaces what the key held, mappings too: `policy.lora={rank: 8}` leaves nothing of the file's policy.lora. Only a
    class of the same name, and `{init_args: …}` without a class, keep something: the former class_path or, of a class alone,
    its arguments. Dotted keys change one value, and may leave out init_args. A text is taken as it is typed, without quotes around
    the whole of it. ConfigError for what is no key=value."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.startswith("-"):
        raise ConfigError(
            f"override {override!r}: expected key=value, such as rollout.group_size=24; files come before overrides"
        )
    return _put(node, kind, key.split("."), text, override)


def _put(node: yaml.Node | None, kind: Parameter, keys: list[str], text: str, override: str) -> yaml.Node:
    """The node with the value `text` at `keys`."""
    if not keys:
        return _replaced(node, _value(kind, text, override))
    if isinstance(node, yaml.SequenceNode):
        raise ConfigError(
            f"override {override!r}: {keys[0]!r} is a key in a list; expected the list as a whole, key=[…]"
        )
    if isinstance(node, yaml.ScalarNode) and not is_null(node) and kind.contract is None:
        raise ConfigError(
            f"override {override!r}: {keys[0]!r} would be a key in {node.value!r}; expected a mapping there"
        )
    if kind.contract is None and not (node is not None and is_part(node)):
        names = (parameters(kind.section) or {}) if kind.section else {}
        return _with(node, keys[0], names.get(keys[0], kind.members or ANYTHING), keys[1:], text, override)
    if keys == ["class_path"]:
        return _put(node, kind, [], text, override)
    part = as_part(node) if node is not None and is_text(node) else node
    if keys[0] == "place" and kind.contract is Reward:
        return _with(_at_place(part, keys[1:2]), "place", ANYTHING, keys[1:], text, override)
    if keys[0] in ("class_path", "init_args"):
        inner = Parameter(dict[str, Any])
        return _with(part, keys[0], inner, keys[1:], text, override) if len(keys) == 1 else _put(
            part, kind, keys[1:], text, override
        )  # fmt: skip
    names = _names(part, kind)
    former = (
        entries_of(part)["init_args"][1]
        if isinstance(part, yaml.MappingNode) and "init_args" in entries_of(part)
        else None
    )
    return _set(part, "init_args", _with(former, keys[0], names.get(keys[0], ANYTHING), keys[1:], text, override))


def _at_place(part: yaml.Node | None, word: list[str]) -> yaml.Node | None:
    """The part, without its place if that is another than the one whose arguments are set, or is a word without arguments."""
    if not word or not isinstance(part, yaml.MappingNode) or "place" not in entries_of(part):
        return part
    place = entries_of(part)["place"][1]
    if isinstance(place, yaml.MappingNode) and list(entries_of(place)) == word:
        return part
    pairs = [pair for name, pair in entries_of(part).items() if name != "place"]
    return yaml.MappingNode(part.tag, pairs, part.start_mark, part.end_mark)


def _with(
    node: yaml.Node | None, name: str, kind: Parameter, keys: list[str], text: str, override: str
) -> yaml.MappingNode:
    former = entries_of(node).get(name) if isinstance(node, yaml.MappingNode) else None
    value = _put(former[1] if former else None, kind, keys, text, override)
    return _set(node, name, value, former[0] if former and keys else None)


def _set(node: yaml.Node | None, name: str, value: yaml.Node, key: yaml.Node | None = None) -> yaml.MappingNode:
    """A mapping with `value` under `name`; what is no mapping is replaced by one. key: the node of `name`, if it stays."""
    entries = dict(entries_of(node)) if isinstance(node, yaml.MappingNode) else {}
    mark = value.start_mark
    entries[name] = (key or yaml.ScalarNode("tag:yaml.org,2002:str", name, mark, mark), value)
    return yaml.MappingNode("tag:yaml.org,2002:map", list(entries.values()), mark, mark)


def _replaced(former: yaml.Node | None, value: yaml.Node) -> yaml.Node:
    """The value in the place of a former one; of a part, its class is kept or its arguments, where only one of them is given."""
    if former is None or not is_part(former):
        return value
    if is_text(value):
        return merge(former, value)
    if isinstance(value, yaml.MappingNode) and list(entries_of(value)) == ["init_args"]:
        return _set(former, "init_args", entries_of(value)["init_args"][1])
    return value


def _value(kind: Parameter, text: str, override: str) -> yaml.Node:
    if str in kind.kinds and text not in ("null", "~"):  # as it is typed: bad: ugly, [x
        text = text[1:-1] if re.fullmatch(r"'[^']*'" r'|"[^"]*"', text) else text
        node: yaml.Node = yaml.ScalarNode("tag:yaml.org,2002:str", text, style='"')
    else:
        node = compose(text, f"override {override!r}") or yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    node.start_mark = node.end_mark = yaml.Mark(f"override {override!r}", 0, 0, 0, "", 0)
    return node


def _names(part: yaml.Node | None, kind: Parameter) -> dict[str, Parameter]:
    """The parameters of a part's class; none where the class cannot be found, which is said later."""
    path = None if part is None else class_path_of(part)
    if path is None:
        return {} if kind.default is NO_DEFAULT else parameters(type(kind.default)) or {}
    try:
        made_by: Callable[..., Any] = import_part(path)
    except (ImportError, ValueError):
        return {}
    return parameters(made_by) or {}
