"""Measuring tools of the doctor and the benchmark: network rows counted by hooks, gradients, and the update with one pass
per edge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.advantage import Advantages, SignalContext
from flowalign.diagnostics.device import Mark, elapsed, mark
from flowalign.models import Policy
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.task import Task
from flowalign.selectors import Selector
from flowalign.selectors.base import START
from flowalign.trainers import EdgeTrainer, Trainer
from rewards import RewardBatch, RewardOutput, RewardSpec
from rewards.base import Input
from samplers import Forest


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward [N] that needs no model and differs between any two images, so that advantages are never all 0."""
    return images.flatten(1).mean(1)


@dataclass(frozen=True)
class StandIn:
    """Brightness in the place of a reward with these channels: channel c scores 10·(brightness^(c+1) − 1), known for certain. The factor
    gives a group the spread of a real score, for parts with a threshold in its unit (Best.min_gap); at most 0, so that losses with a
    margin (Hinge) have a gradient."""

    channels: tuple[str, ...]
    name: str = "brightness"
    videos: bool = False  # of a policy that makes them

    @property
    def spec(self) -> RewardSpec:
        inputs: tuple[Input, ...] = ("videos",) if self.videos else ("images",)
        return RewardSpec(inputs=inputs, channels=self.channels, differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        pictures = batch.videos if self.videos else batch.images
        assert pictures is not None  # `score` refuses a batch without
        bright = brightness(pictures, batch.prompts)
        scores = torch.stack([10 * (bright ** (number + 1) - 1) for number in range(len(self.channels))], 1)
        return RewardOutput(scores, torch.ones_like(scores, dtype=torch.bool), uncertainty=torch.zeros_like(scores))


@dataclass(frozen=True)
class Call:
    """A call of a network: its rows, whether gradients were on, and when."""

    rows: int
    trained: bool
    began: Mark
    ended: Mark

    @property
    def seconds(self) -> float:
        """How long it took."""
        return elapsed(self.began, self.ended)


@contextmanager
def count_calls(policy: Policy) -> Iterator[list[Call]]:
    """A context that lists every call of the policy's networks, whoever makes it: what was really evaluated."""
    calls: list[Call] = []
    began: list[Mark] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        began.append(mark())

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        calls.append(Call(rows, torch.is_grad_enabled(), began.pop(), mark()))

    hooks = [network.register_forward_pre_hook(before) for network in policy.networks()]
    hooks += [network.register_forward_hook(after, with_kwargs=True) for network in policy.networks()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def gradients(policy: Policy, trainer: Trainer, batch: Any) -> dict[str, Tensor]:
    """The gradient of all updates of a batch; no step is taken, and the parameters keep it in .grad."""
    for _, parameter in policy.trainable_parameters():
        parameter.grad = None
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch().backward()
    return {name: p.grad.clone() for name, p in policy.trainable_parameters() if p.grad is not None}


def distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖gradients − expected‖ / ‖expected‖ over all tensors; a missing one counts as 0; inf if `expected` is 0."""
    error = size = 0.0
    for name in gradients.keys() | expected.keys():
        other = expected[name].double() if name in expected else torch.zeros_like(gradients[name]).double()
        mine = gradients[name].double() if name in gradients else torch.zeros_like(other)
        error += float((mine - other).square().sum())
        size += float(other.square().sum())
    return (error / size) ** 0.5 if size else float("inf")


# ------------------------------------------------------------------------------------------ one pass per edge


@dataclass(frozen=True)
class NthSiblings:
    """A selector for one pass per edge: of the edges that `inner` chooses, the n-th of each parent state for n in `numbers`
    (0 is the first).

    states: only at that many parents, the first ones with several chosen edges; None: at all parents."""

    inner: Selector
    numbers: tuple[int, ...]
    states: int | None = None

    def choose(self, forest: Forest, advantages: Advantages, context: SignalContext = START) -> Tensor:
        chosen = self.inner.choose(forest, advantages, context) & advantages.valid.any(1)
        number, several = _number_siblings(forest, chosen)
        chosen = chosen & torch.isin(number, torch.tensor(self.numbers))
        if self.states is None:
            return chosen
        parent = forest.tree.parent[forest.tree.edges]
        return chosen & torch.isin(parent, several[: self.states])


def _number_siblings(forest: Forest, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Each chosen edge's number among the chosen children of its parent [E]; the parents that have several."""
    parent = forest.tree.parent[forest.tree.edges]
    last: dict[int, int] = {}  # of each parent: the number of its last child so far
    number = torch.full_like(parent, -1)
    for row in chosen.nonzero().flatten().tolist():
        state = int(parent[row])
        number[row] = last[state] = last.get(state, -1) + 1
    return number, torch.tensor(sorted(state for state, most in last.items() if most > 0), dtype=torch.int64)


def one_pass_per_edge(
    trainer: EdgeTrainer, task: Task, batch: ScoredRollout, states: int | None = None, children: int | None = None
) -> list[tuple[EdgeTrainer, float]]:
    """Trainers, each with its share of the loss, that together train the same edges with one forward and backward per
    edge: the n-th trains the n-th child of each state. states: see NthSiblings; children: at most that many of each state."""
    number, _ = _number_siblings(batch.forest, trainer.edge_signal(batch).chosen)
    widest = min(int(number.max()) + 1, children or len(number))
    parts = [(n, nth_siblings(trainer, task, (n,), states)) for n in range(widest)]
    counts = [int(part.edge_signal(batch).chosen.sum()) for _, part in parts]
    return [(part, count / sum(counts)) for (_, part), count in zip(parts, counts, strict=True) if count]


def nth_siblings(trainer: EdgeTrainer, task: Task, numbers: tuple[int, ...], states: int | None = None) -> EdgeTrainer:
    """A copy of the trainer that trains only these; see NthSiblings."""
    other = trainer.narrowed(lambda select: NthSiblings(select, numbers, states))
    other.prepare(task, None)
    return other
