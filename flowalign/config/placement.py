"""Where a reward lives, one word of YAML beside its class: `place`."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from flowalign.config.layers import as_part, entries_of, is_null
from flowalign.errors import ConfigError

PLACES = {"process": None, "offload": "rewards.Offloaded", "worker": "rewards.InWorker", "http": "rewards.Http"}


def placed(node: yaml.MappingNode, key: str, check: Callable[[yaml.Node], yaml.MappingNode]) -> yaml.MappingNode:
    """A reward's node without `place`, inside the reward that this word stands for. ConfigError for another word. check: the
    reward by itself, under its own key, before it is inside another.

    place: worker, or with arguments of that reward, place: {worker: {python: other/.venv/bin/python}}."""
    entries = entries_of(node)
    if "place" not in entries:
        return node
    name, place = entries.pop("place")
    inner = yaml.MappingNode(node.tag, list(entries.values()), node.start_mark, node.end_mark)
    word, options = place, None
    if isinstance(place, yaml.MappingNode) and len(place.value) == 1:
        word, options = place.value[0]
    if is_null(word):
        return inner
    if not isinstance(word, yaml.ScalarNode) or word.value not in PLACES:
        got = word.value if isinstance(word, yaml.ScalarNode) else "several words"
        raise ConfigError(
            f"got {key}.place={got!r}; expected one of {', '.join(PLACES)}, or one of them with its arguments: place: {{worker: "
            "{timeout: 60}}"
        )
    around = PLACES[word.value]
    given = [] if options is None or is_null(options) else options.value
    if not isinstance(given, list) or (options is not None and isinstance(options, yaml.SequenceNode)):
        raise ConfigError(f"got {key}.place.{word.value}={given!r}; expected a mapping of arguments")
    if any(given_name.value == "reward" for given_name, _ in given):
        raise ConfigError(
            f"got {key}.place.{word.value}.reward; expected the reward under {key}.class_path, and here arguments of its place"
        )
    inner = check(inner)
    if around is None:
        if given:
            raise ConfigError(f"got {key}.place.process with arguments; expected none")
        return inner
    part = as_part(yaml.ScalarNode("tag:yaml.org,2002:str", around, name.start_mark, name.end_mark))
    reward = yaml.ScalarNode("tag:yaml.org,2002:str", "reward", name.start_mark, name.end_mark)
    arguments = yaml.MappingNode(part.tag, [(reward, inner), *given], name.start_mark, name.end_mark)
    init = yaml.ScalarNode("tag:yaml.org,2002:str", "init_args", name.start_mark, name.end_mark)
    return yaml.MappingNode(part.tag, [*part.value, (init, arguments)], node.start_mark, node.end_mark)
