"""Configuration files as layers: several YAML files become one, later files over earlier ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from flowalign.config.yaml_text import MAX_BYTES, compose
from flowalign.errors import ConfigError


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments as (files, overrides): files come first, the first key=value (or option) ends them."""
    count = 0
    while count < len(arguments) and not re.match(r"-|[A-Za-z_][\w.]*=", arguments[count]):
        count += 1
    return list(arguments[:count]), list(arguments[count:])


def read_layer(path: str) -> yaml.MappingNode:
    """One file, as YAML nodes (they know their line). Raises ConfigError, which names the file, for what is no YAML mapping
    or cannot be read; see `flowalign.config.yaml_text.compose`."""
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ConfigError(
            f"configuration file {path!r} {what} (working directory: {Path.cwd()}); expected a YAML file; an override is "
            "written key=value, such as rollout.group_size=24"
        )
    try:
        with open(path, encoding="utf-8-sig") as stream:
            node = compose(stream.read(MAX_BYTES + 1), path)
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as YAML in UTF-8: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        what = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}.get(type(node), "nothing")
        raise ConfigError(f"{path}: expected sections such as run, policy, rollout; got {what}")
    return node


def merge(former: yaml.Node, later: yaml.Node) -> yaml.Node:
    """`later` over `former`, neither of them changed.

    Mappings are merged key by key, to any depth; anything else (numbers, strings, lists, null) is replaced. A part is
    `{class_path: X, init_args: {…}}`, or the string X alone. If both name a class and the classes differ, the later part
    replaces the former as a whole, so no argument of one class reaches another. `init_args` without a class_path go to
    the class that the other file names."""
    if is_part(later) and is_text(former):
        former = as_part(former)
    elif is_part(former) and is_text(later):
        later = as_part(later)
    if not (isinstance(former, yaml.MappingNode) and isinstance(later, yaml.MappingNode)):
        return later
    old, new = entries_of(former), entries_of(later)
    named = [str(entries["class_path"][1].value) for entries in (old, new) if "class_path" in entries]
    if len(set(named)) > 1:
        return later
    for name, (key, value) in new.items():
        old[name] = (
            key,
            merge(old[name][1], value) if name in old and not _other_place(name, old[name][1], value) else value,
        )
    return yaml.MappingNode(later.tag, list(old.values()), later.start_mark, later.end_mark)


def _other_place(name: str, former: yaml.Node, later: yaml.Node) -> bool:
    """Whether a reward goes to another place, to which the arguments of its former one do not go along."""
    both = isinstance(former, yaml.MappingNode) and isinstance(later, yaml.MappingNode)
    return name == "place" and both and entries_of(former).keys() != entries_of(later).keys()


def entries_of(node: yaml.Node) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Its (key, value) by key; the last counts, as where `<<` brought a key in that the mapping also gives itself."""
    return {key.value: (key, value) for key, value in node.value}


def class_path_of(part: yaml.Node) -> str | None:
    """The class that a part names; None if it names none."""
    if is_text(part):
        return str(part.value)
    path = (
        entries_of(part)["class_path"][1]
        if isinstance(part, yaml.MappingNode) and "class_path" in entries_of(part)
        else None
    )
    return None if path is None else str(path.value)


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def is_part(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and not {"class_path", "init_args", "place"}.isdisjoint(entries_of(node))


def is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def as_part(text: yaml.Node) -> yaml.MappingNode:
    key = yaml.ScalarNode("tag:yaml.org,2002:str", "class_path", text.start_mark, text.end_mark)
    return yaml.MappingNode("tag:yaml.org,2002:map", [(key, text)], text.start_mark, text.end_mark)


def origins(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, "file, line n") of every value and section; `init_args` and `class_path` are left out of the key."""
    if not isinstance(node, yaml.MappingNode):
        return
    for name, (key, value) in entries_of(node).items():
        full = prefix if name in ("init_args", "class_path") else f"{prefix}.{name}".strip(".")
        if full != prefix:
            yield full, f"{key.start_mark.name}, line {key.start_mark.line + 1}"
        yield from origins(value, full)


def located(message: str, node: yaml.Node) -> str:
    """`message`, and for each key that it names the file and line that gave it, or nothing if an override did. Of a section
    and a key in it, only the key."""
    known = dict(origins(node))
    found: dict[str, str] = {}
    for dotted, quoted in re.findall(r"([a-z_]+(?:\.\w+)+)|key '(\w+)'", re.sub("did you mean '.*?'", "", message)):
        name = dotted or quoted
        full = [key for key in known if key == name or key.endswith(f".{name}")]
        if len(full) == 1 and not known[full[0]].startswith("override"):
            found[full[0]] = known[full[0]]
    deepest = [key for key in found if not any(other.startswith(f"{key}.") for other in found)]
    places = "; ".join(f"{key}: {found[key]}" for key in deepest)
    return f"{message} ({places})" if places else message
