"""YAML files plus overrides -> typed objects; everything that can be checked is, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from flowalign.config.checks import check
from flowalign.config.contracts import check_attributes
from flowalign.config.layers import entries_of, located, merge, read_layer
from flowalign.config.nodes import checked
from flowalign.config.overrides import overridden
from flowalign.config.parser import explain, own_rules
from flowalign.config.settings import TrainConfig
from flowalign.config.types import Parameter
from flowalign.errors import ConfigError
from rewards import Reward
from rewards.base import spec_of


@cache
def parser(kind: type = TrainConfig) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog="flowalign train", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind, as_group=False, fail_untyped=True)
    return parser


def load_config(paths: str | Sequence[str], overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict[str, Any]]:
    """The typed configuration, and as plain data (what is saved and compared on resume; alone it gives the same run).

    paths: one YAML file, or several, later ones over earlier ones (see `flowalign.config.layers.merge`). overrides: key=value,
    over all files, later ones over earlier ones (see `flowalign.config.overrides.overridden`). A run without a name gets those of its files. Raises ConfigError; no model is loaded."""
    paths = [paths] if isinstance(paths, str) else paths
    node, whole = _read(paths), Parameter(TrainConfig)
    given = entries_of(node).get("run")  # what is no mapping is refused below
    if given is None or (isinstance(given[1], yaml.MappingNode) and "name" not in entries_of(given[1])):
        node = overridden(node, f"run.name={'-'.join(Path(path).stem for path in paths)}", whole)
    for override in overrides:
        node = overridden(node, override, whole)
    values, plain = _made(node, TrainConfig)
    config = TrainConfig(**values)
    try:
        check_attributes(config)
        check(config)
    except (ValueError, OSError) as error:
        raise ConfigError(located(str(error), node)) from error
    return config, plain


@dataclass(frozen=True)
class RewardFile:
    """What `load_reward` reads of a configuration."""

    reward: Reward


def load_reward(sources: Sequence[str]) -> Reward:
    """The reward of YAML files (their key `reward`; no other is read) and overrides `reward.…=value`, or of a class or
    function named by its import path. Raises ConfigError; no model is loaded."""
    files = [source for source in sources if source.endswith((".yaml", ".yml"))]
    named = [f"reward={source}" if "=" not in source else source for source in sources if source not in files]
    mark = yaml.Mark("command line", 0, 0, 0, "", 0)
    node: yaml.Node = _read(files) if files else yaml.MappingNode("tag:yaml.org,2002:map", [], mark, mark)
    own = [entry for name, entry in entries_of(node).items() if name == "reward"]
    node = yaml.MappingNode(node.tag, own, node.start_mark, node.end_mark)
    for override in named:
        node = overridden(node, override, Parameter(RewardFile))
    values, _ = _made(node, RewardFile)
    try:
        check_attributes(RewardFile(**values))
        spec_of(values["reward"])
    except (ValueError, OSError) as error:
        raise ConfigError(located(str(error), node)) from error
    reward: Reward = values["reward"]
    return reward


@dataclass(frozen=True)
class JudgesSection:
    """What `load_judges` reads of the section `evaluation`."""

    rewards: list[Reward] = field(default_factory=list)
    training_reward: bool = True


@dataclass(frozen=True)
class JudgesFile:
    """What `load_judges` reads of a configuration."""

    reward: Reward | None = None
    evaluation: JudgesSection = field(default_factory=JudgesSection)


def load_judges(path: str) -> tuple[list[Reward], Reward | None]:
    """evaluation.rewards of a YAML file, and its `reward` unless it says evaluation.training_reward=false; no other key is read.
    Raises ConfigError; no model is loaded."""
    node = _only(read_layer(path), {"reward": None, "evaluation": {"rewards": None, "training_reward": None}})
    values, _ = _made(node, JudgesFile)
    file = JudgesFile(**values)
    try:
        check_attributes(file)
        for judge in (*file.evaluation.rewards, *([] if file.reward is None else [file.reward])):
            spec_of(judge)
    except (ValueError, OSError) as error:
        raise ConfigError(located(str(error), node)) from error
    return list(file.evaluation.rewards), file.reward if file.evaluation.training_reward else None


def _only(node: yaml.Node, keys: dict[str, Any]) -> yaml.Node:
    """The node with these keys alone; of a section, those that stand under its key."""
    if not isinstance(node, yaml.MappingNode):
        return node
    pairs = [(key, value if keys[name] is None else _only(value, keys[name]))
             for name, (key, value) in entries_of(node).items() if name in keys]  # fmt: skip
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _made(node: yaml.Node, kind: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `kind` as objects, and as plain data. ConfigError."""
    try:
        text = yaml.serialize(checked(node, Parameter(kind)))
        reader = parser(kind)
        with own_rules():
            namespace = reader.parse_args(["--config", text])
            plain = yaml.safe_load(reader.dump(namespace, skip_unset=False, skip_validation=True))  # it has just been
            objects = reader.instantiate(namespace)
    except ConfigError as error:
        raise ConfigError(located(str(error), node)) from error
    except Exception as error:  # jsonargparse raises many kinds; each is a fault of the configuration
        raise ConfigError(located(explain(str(error)), node)) from error
    plain.pop("config", None)
    values = objects.as_dict() if isinstance(objects, Namespace) else dict(objects)
    values.pop("config", None)
    return values, plain


def as_written(paths: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The files and overrides as one, as plain data without defaults; what `load_config` has accepted."""
    node = _read(paths)
    for override in overrides:
        node = overridden(node, override, Parameter(TrainConfig))
    content: dict[str, Any] = yaml.safe_load(yaml.serialize(node))
    return content


def _read(paths: Sequence[str]) -> yaml.Node:
    """All files as one."""
    if not paths:
        raise ConfigError(
            "no configuration file was named; expected at least one, such as "
            "configs/quickstart.yaml, before the overrides"
        )
    layers: list[yaml.Node] = [read_layer(path) for path in paths]
    return reduce(merge, layers)
