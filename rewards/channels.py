"""Several rewards side by side, each with channels of its own: nothing is summed before the advantages are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, labels_of
from rewards.parts import ask, check_names, close_parts, joint_spec, load_parts, wants_gradient


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of all `rewards`, one after the other: a reward of one channel gives the channel `name`, one of several
    `name/channel`. An advantage combines them (flowalign.advantage.Mixed, PerChannel).

    A sample may be valid in some channels only. Components: those of the parts, as `part/component`. Each part is asked
    through `score`, so a failure names the part. Uncertainty: NaN in the channels of a part that states none.
    """

    rewards: list[Reward]
    name: str = "channels"

    def __post_init__(self) -> None:
        check_names("channels", self.rewards)
        self.spec  # noqa: B018 (checked at construction)

    @property
    def spec(self) -> RewardSpec:
        """The parts' together, with all their channels."""
        return joint_spec("channels", self.rewards, tuple(label for part in self.rewards for label in labels_of(part)))

    load, close = load_parts, close_parts

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        outputs, components, info = ask(self.rewards, batch, grad=wants_gradient(self.spec))
        scores = torch.cat([output.scores.to(outputs[0].scores) for output in outputs], 1)
        valid = torch.cat([output.valid.to(scores.device) for output in outputs], 1)
        uncertainty = None
        if any(output.uncertainty is not None for output in outputs):
            uncertainty = torch.cat(
                [torch.full_like(o.scores, torch.nan) if o.uncertainty is None else o.uncertainty for o in outputs], 1
            ).to(scores)
        return RewardOutput(scores, valid, components, info, uncertainty=uncertainty)
