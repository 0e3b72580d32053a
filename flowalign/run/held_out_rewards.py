"""What a run's evaluations score: evaluation.rewards, and what the run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.config import TrainConfig
from rewards import Reward, RewardBatch, RewardOutput, RewardSpec, labels_of
from rewards.remote.description import fingerprint


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


def _settings(reward: Reward) -> str:
    """The same in every place. The repr of a dataclass is its settings; `==` would compare what it has loaded, too."""
    try:
        return fingerprint(reward)
    except ValueError:  # it holds what JSON cannot say
        return repr(reward)


def held_out_rewards(config: TrainConfig) -> list[Reward]:
    """evaluation.rewards, then the training reward, unless evaluation.training_reward is false or one of them has its settings.
    Where its name is taken, it is `NAME_training`."""
    judges, trained = list(config.evaluation.rewards), config.reward
    if not config.evaluation.training_reward or any(_settings(judge) == _settings(trained) for judge in judges):
        return judges
    taken = {label for judge in judges for label in labels_of(judge)}
    clash = taken & set(labels_of(trained))
    return [*judges, Renamed(trained, f"{trained.name}_training") if clash else trained]
