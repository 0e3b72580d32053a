"""Clean samples with their scores: what an objective of states is trained on, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowalign.advantage import SignalContext
from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import Batch, Setup
from flowalign.trainers.signal import EdgeSignal, Signal
from samplers import ODE, Forest, Held, SampleKeys, Tree, sampled


@dataclass(frozen=True, eq=False)
class Places:
    """Where N samples stand, each [N]: their group, their number `local` in it, and their source as in Tree.source."""

    group: Tensor
    local: Tensor
    source: Tensor

    @staticmethod
    def of(tree: Tree) -> Places:
        """Of the samples among the leaves of a tree."""
        leaves = tree.leaves[sampled(tree)]
        return Places(tree.group[leaves], tree.local[leaves], tree.source[leaves])

    def __len__(self) -> int:
        return len(self.group)

    def one_step_each(self) -> Forest:
        """The samples as a forest of N trees, each one stochastic step from its root to its sample, without states; edges are in
        the order of the samples. By it credit, advantages and selectors, which are written for steps, compare whole samples."""
        count = len(self)
        rows, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        tree = Tree(
            parent=torch.cat([zeros - 1, rows]), root=rows.repeat(2), group=self.group.repeat(2),
            local=torch.cat([2 * self.local, 2 * self.local + 1]), index=torch.cat([zeros, zeros + 1]),
            level=torch.cat([zeros, zeros + 1]).double(), source=self.source.repeat(2),
            probe=torch.zeros(2 * count, dtype=torch.bool), num_steps=1,
        )  # fmt: skip
        nowhere = torch.full((2 * count,), -1)
        return Forest(tree, torch.tensor([1.0, 0.0]), ODE(), torch.empty(0, 1), nowhere, torch.zeros(2 * count), 0)


@dataclass(frozen=True, eq=False)
class Samples:
    """N clean latents [N, *] at their places, of which a process has those of its groups. scores, valid [N, C]: by `channels`.
    keys: of the draws. sigmas [T+1]: the grid of the rollout. uids: the prompt of each group; conditions: a row for each group."""

    latents: Held
    places: Places
    scores: Tensor
    valid: Tensor
    channels: tuple[str, ...]
    keys: SampleKeys
    sigmas: Tensor
    uids: tuple[int, ...]
    conditions: Conditions

    def signal(self, signal: Signal, context: SignalContext) -> EdgeSignal:
        """Advantages and selection, rows in the order of the samples."""
        return signal.edges(self.places.one_step_each(), self.scores, self.valid, self.channels, context)


class SampleBatch(Batch, Protocol):
    """A batch of samples."""

    @property
    def samples(self) -> Samples: ...

    @property
    def iteration(self) -> int: ...


class SampleSource(Protocol):
    """Where the samples of an iteration come from."""

    @property
    def role(self) -> str | None:
        """Whose samples they are; None: nobody's, such as images of a file."""
        ...

    @property
    def rolled(self) -> bool:
        """Whether they are rolled out, which costs what the plan says; others are there already."""
        ...

    def check(self, setup: Setup) -> None:
        """ValueError or FileNotFoundError where it cannot work; called before a model is loaded."""
        ...

    def channels(self, reward: tuple[str, ...]) -> tuple[str, ...]:
        """Of the scores of its samples, for a reward with the channels `reward`."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a user should know before the run, a line each."""
        ...

    def prepare(self, task: Task) -> None:
        """Before the first iteration of a process."""
        ...

    def digest(self) -> str:
        """Of data that are not the run's prompts, by which a resumed run recognizes them; "" for none."""
        ...

    def places(self, rollout: Rollout, iteration: int, groups: int) -> Places:
        """Of the samples of `groups` groups of an iteration, without making them."""
        ...

    def collect(self, task: Task, records: Sequence[PromptRecord], iteration: int) -> SampleBatch:
        """The samples of the prompts of an iteration, scored."""
        ...


@dataclass(frozen=True, eq=False)
class RolledOut:
    """A scored rollout as samples."""

    rollout: ScoredRollout
    samples: Samples

    @property
    def iteration(self) -> int:
        return self.rollout.iteration

    @property
    def metrics(self) -> dict[str, float]:
        return self.rollout.metrics

    @property
    def images(self) -> int:
        return self.rollout.images

    def picture(self) -> bytes:
        return self.rollout.picture()


@dataclass(frozen=True)
class FromRollout:
    """The samples of a rollout under the weights of `role`: "policy", or a role that lags behind it ("old", "fast_ema"), or
    "reference" for data of the model before training."""

    role: str = "policy"
    rolled = True

    def check(self, setup: Setup) -> None: ...

    def channels(self, reward: tuple[str, ...]) -> tuple[str, ...]:
        return reward

    def notes(self) -> tuple[str, ...]:
        return ()

    def prepare(self, task: Task) -> None: ...

    def digest(self) -> str:
        return ""

    def places(self, rollout: Rollout, iteration: int, groups: int) -> Places:
        return Places.of(grow(rollout, 0, iteration, range(groups)))

    def collect(self, task: Task, records: Sequence[PromptRecord], iteration: int) -> RolledOut:
        with task.policy.role(self.role):
            batch = collect(task, records, iteration)
        tree = batch.forest.tree
        own = sampled(tree)
        leaves = tree.leaves[own]
        keys = SampleKeys.of(task.seed, iteration, tree, leaves, batch.uids)
        samples = Samples(
            Held(batch.forest.row[leaves], batch.forest.states), Places.of(tree), batch.scores[own], batch.valid[own], batch.channels, keys,
            batch.forest.sigmas, batch.uids, batch.conditions,
        )  # fmt: skip
        return RolledOut(batch, samples)
