"""A reward whose network leaves the GPU between two calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec


class HasNetwork(Reward, Protocol):
    """A reward of a loaded network, which comes to the device of a batch with each call."""

    def offload(self) -> None:
        """Moves the network to the CPU; may be called at any time without a graph, and before `load`."""
        ...


@dataclass(frozen=True, eq=False)
class Offloaded:
    """`reward`, whose network is on the CPU while it is not asked; name, scores, gradients and messages are its own.

    For a reward and a policy that do not fit beside each other. A call moves the weights there and back (7B in bf16: 15 GB),
    so ask it rarely, of large batches (rollout.micro_batch). After a call with gradients they stay, since the backward reads
    them, until the next call without. ValueError for a reward without a network of its own."""

    reward: HasNetwork

    def __post_init__(self) -> None:
        if not callable(getattr(self.reward, "offload", None)):
            raise ValueError(
                f"got Offloaded of {self.reward.name!r}; expected a reward of a loaded network, with a method `offload`: put this "
                "around a part of a mix, not around the mix"
            )

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        return self.reward.spec

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        try:
            return self.reward(batch)
        finally:
            if not torch.is_grad_enabled():
                self.reward.offload()
