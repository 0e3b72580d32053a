"""Credit from scores of states, credit summed along the way, and several credits side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import Credit, EdgeValues, lines
from samplers import Forest


@dataclass(frozen=True)
class Process:
    """A latent process reward, forest.scores[`score`], of the states around an edge (Euphonium 2602.04928).

    timing "post" (default): the state arrived at; "gain": post − pre; "pre": the state left, as in the authors' code,
    which credits an action with what was there before it. The scores of leaves are not read: put this beside a credit
    that reads them with Joined. Not valid where the state was not scored, nor in grid steps before `start`, where a reward of
    almost pure noise would only add noise (Euphonium's code scores the guided steps)."""

    score: str
    timing: Literal["pre", "post", "gain"] = "post"
    start: int = 0

    def __post_init__(self) -> None:
        if self.timing not in ("pre", "post", "gain"):
            raise ValueError(f"got Process.timing={self.timing!r}; expected 'pre', 'post' or 'gain'")
        if self.start < 0:
            raise ValueError(f"got Process.start={self.start}; expected a grid step, at least 0")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        if self.score not in forest.scores:
            raise ValueError(
                f"got no state scores named {self.score!r} (this rollout has: {sorted(forest.scores) or 'none'}). "
                "Name a latent reward with this channel under process_rewards, or take a credit of samples or probes "
                "(Broadcast, SubtreeFusion, Gain)"
            )
        of_state = forest.scores[self.score].double().cpu()
        before, after = of_state[forest.tree.parent[forest.tree.edges]], of_state[forest.tree.edges]
        values = {"pre": before, "post": after, "gain": after - before}[self.timing][:, None]
        tree = forest.tree
        scored = values.isfinite() & (tree.index[tree.parent[tree.edges]] >= self.start)[:, None]
        return EdgeValues(torch.where(scored, values, 0.0), scored, (self.score,))


@dataclass(frozen=True)
class ReturnToGo:
    """The credit of a step and of the stochastic steps after it: G = r + discount · (mean of G over the next steps).

    steps: the credit r of each step. On a chain with Gain and discount 1 it is V_n − V_k. Valid only if every step below
    is."""

    steps: Credit
    discount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"got ReturnToGo.discount={self.discount}; expected a number inside [0, 1]")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        own = self.steps.assign(forest, scores, valid, channels)
        values, complete = own.values.clone(), own.valid.clone()
        above, generation = lines(forest.tree).above, forest.tree.generation[forest.tree.edges]
        count = above[above >= 0].bincount(minlength=len(above))
        for depth in generation.unique().flip(0).tolist():  # a step's next ones lie deeper: they are complete
            here = (generation == depth) & (above >= 0)
            before = above[here]
            values.index_add_(0, before, self.discount * values[here] / count[before, None])
            incomplete = torch.zeros_like(values).index_add_(0, before, (~complete[here]).double())
            complete &= incomplete == 0
        return EdgeValues(torch.where(complete, values, 0.0), complete, own.channels)


@dataclass(frozen=True)
class Joined:
    """Several credits side by side: channel c of the part called p becomes the channel "p/c" (say an outcome reward
    broadcast and a gain). PerChannel normalizes them in different sets, a clipped ratio sums their terms."""

    parts: dict[str, Credit]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(
                f"got Joined.parts {sorted(self.parts)}; expected at least two credits by name: take a single one itself"
            )

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        assigned = {name: part.assign(forest, scores, valid, channels) for name, part in self.parts.items()}
        return EdgeValues(
            torch.cat([part.values for part in assigned.values()], 1),
            torch.cat([part.valid for part in assigned.values()], 1),
            tuple(f"{name}/{channel}" for name, part in assigned.items() for channel in part.channels),
        )
