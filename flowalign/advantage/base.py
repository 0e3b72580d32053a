"""What an advantage is, and the sets it is taken in.

The sets: `prompt` all edges of a prompt's group; `prompt_step` those of one grid step (DenseGRPO,
TP-GRPO); `seed_step` those of one start noise and grid step (TempFlow-GRPO's seed group); `tree_depth` those of one root
and generation (BranchGRPO); `batch` everything. Statistics are gathered by these keys, never by position, and from valid
edges only.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flowalign.credit import EdgeValues
from samplers import Forest

Within = Literal["prompt", "prompt_step", "seed_step", "tree_depth", "batch"]
FLAT = 1e-6  # a set whose std is below this has no order: its advantages are 0


@dataclass(frozen=True)
class Advantages:
    """`values` [E, C] fp32, 0 where not `valid` [E, C]; `zero_std_ratio` = share of sets in which nothing differs."""

    values: Tensor
    valid: Tensor
    zero_std_ratio: float


@dataclass(frozen=True)
class SignalContext:
    """What advantages and selectors may depend on beside the batch, and nothing else.

    seed: of the run. iteration: of the loop. uids: the prompt uid of each group, so that statistics and draws do not
    depend on which process holds the prompt; () stands for the groups' numbers. memory: running statistics, as JSON with
    text keys, from one iteration to the next: whoever keeps some writes them here, and the trainer saves and restores
    them; a part that wraps several gives each a memory of its own, under its name."""

    seed: int = 0
    iteration: int = 0
    uids: Sequence[int] = ()
    memory: MutableMapping[str, Any] = field(default_factory=dict)


class Advantage(Protocol):
    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        """Advantages of all edges, rows in the order of `forest.tree.edges`; a column per channel, or one for their sum."""
        ...


@dataclass(frozen=True, eq=False)
class Sets:
    """One channel seen set by set: `keys` [E] the set of each edge, `values` [E] (0 where invalid), `valid` [E].

    count: valid edges, samples: the most valid edges that one grid step has (in a chain, the samples), each [K]."""

    keys: Tensor
    values: Tensor
    valid: Tensor
    count: Tensor
    samples: Tensor

    @property
    def usable(self) -> Tensor:
        """[K] sets that have a baseline: two valid edges or more."""
        return self.count >= 2

    def moments(self, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and population std of each set [K], over the edges `among` [E] (all valid ones by default)."""
        weight = (self.valid if among is None else among).double()
        count = _sum(self.keys, weight, len(self.count)).clamp(min=1)
        mean = _sum(self.keys, self.values * weight, len(self.count)) / count
        spread = _sum(self.keys, ((self.values - mean[self.keys]) * weight) ** 2, len(self.count)) / count
        return mean, spread.sqrt()


def set_keys(forest: Forest, within: Within) -> Tensor:
    """The set number [E] of each edge of the forest."""
    tree, edges = forest.tree, forest.tree.edges
    group, step = tree.group[edges], tree.index[tree.parent[edges]]
    parts = {
        "prompt": (group,),
        "prompt_step": (group, step),
        "seed_step": (tree.root[edges], step),
        "tree_depth": (tree.root[edges], tree.generation[edges]),
        "batch": (torch.zeros_like(group),),
    }[within]
    return torch.unique(torch.stack(parts, 1), dim=0, return_inverse=True)[1]


def by_channel(
    forest: Forest, credit: EdgeValues, within: Within, rule: Callable[[Sets], tuple[Tensor, Tensor]]
) -> Advantages:
    """Apply `rule` to each channel: Sets -> (advantages [E], spread [K] that tells a flat set).

    Edges of a flat set get 0; those of a set of fewer than two valid edges are invalid."""
    keys = set_keys(forest, within)
    steps = forest.tree.index[forest.tree.parent[forest.tree.edges]]
    values, valid, flat = [], [], []
    for column, scored in zip(credit.values.T, credit.valid.T, strict=True):
        sets = _sets(keys, steps, column, scored)
        advantage, spread = rule(sets)
        kept = scored & sets.usable[keys]
        values.append(torch.where(kept & (spread > FLAT)[keys], advantage, 0.0))
        valid.append(kept)
        usable = spread[sets.usable]
        flat.append(float((usable <= FLAT).double().mean()) if len(usable) else 1.0)
    return Advantages(torch.stack(values, 1).float(), torch.stack(valid, 1), sum(flat) / len(flat))


def _sets(keys: Tensor, steps: Tensor, values: Tensor, valid: Tensor) -> Sets:
    number = int(keys.max()) + 1 if len(keys) else 0
    cells, cell = torch.unique(torch.stack([keys, steps], 1), dim=0, return_inverse=True)
    in_cell = _sum(cell, valid.double(), len(cells))
    samples = torch.zeros(number, dtype=torch.float64).scatter_reduce(0, cells[:, 0], in_cell, "amax")
    return Sets(keys, torch.where(valid, values, 0.0), valid, _sum(keys, valid.double(), number), samples)


def _sum(keys: Tensor, values: Tensor, number: int) -> Tensor:
    return torch.zeros(number, dtype=torch.float64).index_add_(0, keys, values)
