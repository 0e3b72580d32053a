"""What a run's evaluations score: evaluation.rewards, and what the run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.config import TrainConfig
from rewards import Reward, RewardBatch, RewardOutput, RewardSpec, labels_of


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
    judges, trained = list(config.evaluation.rewards), config.reward
    if not config.evaluation.training_reward or any(repr(judge) == repr(trained) for judge in judges):
        return judges  # the repr of a dataclass is its settings; `==` would compare what it has loaded, too
    taken = {label for judge in judges for label in labels_of(judge)}
    clash = taken & set(labels_of(trained))
    return [*judges, Renamed(trained, f"{trained.name}_training") if clash else trained]
