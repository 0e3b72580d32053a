"""What evaluations score: evaluation.rewards, and what a run trains on; and which of them is which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.config import TrainConfig
from flowalign.evaluation.parts import settings_of
from rewards import Reward, RewardBatch, RewardOutput, RewardSpec, labels_of
from rewards.import_path import path_of
from rewards.remote.description import AROUND, describe


@dataclass(frozen=True)
class Renamed:
    """`reward` under another name; everything else is the reward's."""

    reward: Reward
    name: str

    @property
    def spec(self) -> RewardSpec:
        return self.reward.spec

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return self.reward(batch)


def held_out_rewards(config: TrainConfig) -> list[Reward]:
    """evaluation.rewards, then the training reward, unless evaluation.training_reward is false or one of them has its settings.
    Where its name is taken, it is `NAME_training`."""
    judges = list(config.evaluation.rewards)
    return with_trained(judges, config.reward) if config.evaluation.training_reward else judges


def with_trained(judges: list[Reward], trained: Reward) -> list[Reward]:
    """The judges, then `trained` unless one of them has its settings; `NAME_training` where its name is taken."""
    if any(settings_of(judge) == settings_of(trained) for judge in judges):
        return judges
    taken = {label for judge in judges for label in labels_of(judge)}
    clash = taken & set(labels_of(trained))
    return [*judges, Renamed(trained, f"{trained.name}_training") if clash else trained]


def trained_labels(judges: Sequence[Reward], trained: Sequence[Reward]) -> frozenset[str]:
    """The labels of those judges that stand among `trained` or within one of them (a Mix), wherever they are asked and whatever
    their names are. Not kept: of rewards that JSON cannot describe only the same object is known again."""
    known = [part for reward in trained for part in _parts(reward)]
    return frozenset(label for judge in judges if _parts(judge)[0] in known for label in labels_of(judge))


def _parts(reward: Reward) -> list[Any]:
    """The reward without what is around it, then all that is within it."""
    try:
        return list(_nested(describe(reward)))
    except ValueError:
        return [id(reward)]


def _nested(value: Any) -> Iterator[dict[str, Any]]:
    """The descriptions within one, without names, outermost first."""
    if isinstance(value, dict):
        if "class_path" in value and value["class_path"] not in (*AROUND, path_of(Renamed)):
            yield {**value, "init_args": {key: each for key, each in value["init_args"].items() if key != "name"}}
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _nested(each)
