"""Reads YAML within bounds: what is deep, endless, huge or of another language than configurations is an error, and soon."""

from __future__ import annotations

import re
from typing import Any

import yaml

from flowalign.errors import ConfigError

MAX_BYTES, MAX_NODES, MAX_DEPTH = 2**20, 10_000, 50
TAGS = ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp")


def compose(text: str, source: str) -> yaml.Node | None:
    """The nodes of a YAML text (they know their line), with `<<` resolved; None for an empty one. ConfigError, which begins
    with `source`, for what is no YAML, for aliases that expand to more than MAX_NODES nodes or contain themselves, for
    nesting beyond MAX_DEPTH, a tag such as !!python/object, a key that is no text, and a key that is given twice."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError(f"{source} has more than {MAX_BYTES:,} bytes; expected a configuration")
    depth = 0
    for bracket in re.finditer(
        r"[\[{]|[\]}]", text
    ):  # before the scanner, whose time grows with the square of the depth
        depth += 1 if bracket[0] in "[{" else -1
        if depth > 10 * MAX_DEPTH:
            raise ConfigError(f"{source} is nested too deeply; expected at most {MAX_DEPTH} levels")
    try:
        loader = yaml.SafeLoader(text)
        loader.name = source
        node = loader.get_single_node()
        if node is not None:
            _measure(node, source, {}, 0)
            _check(node, source, loader, set(), "")
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply; expected at most {MAX_DEPTH} levels") from error
    return node


def _measure(node: yaml.Node, source: str, known: dict[int, int | None], depth: int) -> int:
    """How many nodes it has with every alias written out. known: of nodes by id; None for one that is being measured."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source}, line {_line(node)}: nested too deeply; expected at most {MAX_DEPTH} levels")
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ConfigError(f"{source}, line {_line(node)}: an alias that contains itself; expected a tree")
        return size
    known[id(node)] = None
    size = 1 + sum(_measure(child, source, known, depth + 1) for child in _children(node))
    if size > MAX_NODES:
        raise ConfigError(
            f"{source}, line {_line(node)}: more than {MAX_NODES:,} values with every alias written out; expected a configuration"
        )
    known[id(node)] = size
    return size


def _check(node: yaml.Node, source: str, loader: yaml.SafeLoader, seen: set[int], key: str) -> None:
    """Tags, keys, and keys that are given twice, of which YAML itself would keep the last in silence. Resolves `<<`, in place."""
    if id(node) in seen:
        return
    seen.add(id(node))
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if tag not in TAGS:
        raise ConfigError(
            f"{source}, line {_line(node)}: got {key or 'a configuration'} with the tag {tag!r}; expected plain YAML, without tags"
        )
    if isinstance(node, yaml.MappingNode):
        given: set[Any] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode) or not name.tag.endswith((":str", ":int", ":merge")):
                text = name.value if isinstance(name, yaml.ScalarNode) else "of several values"
                raise ConfigError(
                    f'{source}, line {_line(name)}: the key {text} is no text; write it in quotes, "{text}"'
                )
            if name.value in given:
                raise ConfigError(f"{source}, line {_line(name)}: {name.value!r} is given twice; keep one")
            given.add(name.value)
        loader.flatten_mapping(node)
    names = [name.value for name, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    values = [value for _, value in node.value] if names else _children(node)
    for number, value in enumerate(values):
        _check(value, source, loader, seen, f"{key}.{names[number]}".strip(".") if names else key)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
