"""Advantage: values of edges -> advantages inside a declared set.

The sets (grpo_family §11.1): `prompt` all edges of a prompt's group; `prompt_step` those of one grid step (DenseGRPO,
TP-GRPO); `seed_step` those of one start noise and grid step (TempFlow-GRPO's seed group); `tree_depth` those of one root
and generation (BranchGRPO); `batch` everything. Statistics are gathered by these keys, never by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.credit import EdgeValues
from samplers import Forest

Within = Literal["prompt", "prompt_step", "seed_step", "tree_depth", "batch"]


@dataclass(frozen=True)
class Advantages:
    """`values` [E, C] fp32, 0 where not `valid` [E, C]; `zero_std_ratio` = share of sets in which nothing differs."""

    values: Tensor
    valid: Tensor
    zero_std_ratio: float


class Advantage(Protocol):
    def compare(self, forest: Forest, credit: EdgeValues) -> Advantages: ...


@dataclass(frozen=True)
class Normalised:
    """(value − mean of its set) / (std + delta), clipped (grpo_family §2.3).

    `std`: "set" the set's own (per-prompt), "batch" that of all valid edges (Flow-GRPO's global std), "largest" the
    largest of all sets (LongCat), "none" no division (Dr. GRPO). Population std unless `unbiased` (DanceGRPO; it counts
    edges, so use it with a set that holds each sample once, `prompt_step`). A set of fewer than two valid edges has no
    baseline: its edges are invalid. A set whose spread is below 1e-6 gets advantage 0."""

    within: Within = "prompt"
    std: Literal["set", "batch", "largest", "none"] = "set"
    delta: float = 1e-4
    clip: float = 5.0
    unbiased: bool = False

    def compare(self, forest: Forest, credit: EdgeValues) -> Advantages:
        keys = set_keys(forest, self.within)
        columns = [self._channel(keys, value, ok) for value, ok in zip(credit.values.T, credit.valid.T, strict=True)]
        values, valid, flat = (list(part) for part in zip(*columns, strict=True))
        return Advantages(torch.stack(values, 1).float(), torch.stack(valid, 1), sum(flat) / len(flat))

    def _channel(self, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, float]:
        sets = int(keys.max()) + 1
        weight = valid.double()
        values = torch.where(valid, values, 0.0)
        count = torch.zeros(sets, dtype=torch.float64).index_add_(0, keys, weight)
        mean = torch.zeros_like(count).index_add_(0, keys, values * weight) / count.clamp(min=1)
        centred = (values - mean[keys]) * weight
        squares = torch.zeros_like(count).index_add_(0, keys, centred**2)
        std = (squares / (count - int(self.unbiased)).clamp(min=1)).sqrt()
        usable = count >= 2
        advantage = centred / (self._scale(std, usable, values, weight)[keys] + self.delta)
        if self.std == "none":
            advantage = centred
        advantage = torch.where((std > 1e-6)[keys], advantage, 0.0).clamp(-self.clip, self.clip)
        flat = float((std[usable] <= 1e-6).double().mean()) if bool(usable.any()) else 1.0
        valid = valid & usable[keys]
        return torch.where(valid, advantage, 0.0), valid, flat

    def _scale(self, std: Tensor, usable: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        if self.std == "batch":  # of the raw rewards of the whole batch, not of the centred ones (flow_grpo)
            mean = (values * weight).sum() / weight.sum().clamp(min=1)
            return (((values - mean) ** 2 * weight).sum() / weight.sum().clamp(min=1)).sqrt().expand_as(std)
        if self.std == "largest":
            return (std[usable].max() if bool(usable.any()) else std.new_zeros(())).expand_as(std)
        return std


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
