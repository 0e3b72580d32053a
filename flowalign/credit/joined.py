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
    that reads them with Joined. Not valid where the state was not scored."""

    score: str
    timing: Literal["pre", "post", "gain"] = "post"

    def __post_init__(self) -> None:
        if self.timing not in ("pre", "post", "gain"):
            raise ValueError(f"Process.timing={self.timing!r} came; expected 'pre', 'post' or 'gain'")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        if self.score not in forest.scores:
            raise ValueError(
                f"no states were scored by {self.score!r}; scored were {sorted(forest.scores)}: set them with "
                "forest.with_scores before the credit is assigned"
            )
        of_state = forest.scores[self.score].double().cpu()
        before, after = of_state[forest.tree.parent[forest.tree.edges]], of_state[forest.tree.edges]
        values = {"pre": before, "post": after, "gain": after - before}[self.timing][:, None]
        known = values.isfinite()
        return EdgeValues(torch.where(known, values, 0.0), known, (self.score,))


@dataclass(frozen=True)
class ReturnToGo:
    """The credit of a step and of the stochastic steps after it: G = r + discount · (mean of G over the next steps).

    `steps` says r. On a chain with Gain and discount 1 it is V_n − V_k. Valid only if every step below is."""

    steps: Credit
    discount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"ReturnToGo.discount={self.discount} came; expected a number inside [0, 1]")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        own = self.steps.assign(forest, scores, valid, channels)
        values, known = own.values.clone(), own.valid.clone()
        above, generation = lines(forest.tree).above, forest.tree.generation[forest.tree.edges]
        count = above[above >= 0].bincount(minlength=len(above))
        for depth in generation.unique().flip(0).tolist():  # a step's next ones lie deeper: they are complete
            here = (generation == depth) & (above >= 0)
            up = above[here]
            values.index_add_(0, up, self.discount * values[here] / count[up, None])
            broken = torch.zeros_like(values).index_add_(0, up, (~known[here]).double())
            known &= broken == 0
        return EdgeValues(torch.where(known, values, 0.0), known, own.channels)


@dataclass(frozen=True)
class Joined:
    """Several credits side by side: channel c of the part called p becomes the channel "p/c" (say an outcome reward
    broadcast and a process reward). PerChannel normalizes them in different sets, a clipped ratio sums their terms."""

    parts: dict[str, Credit]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("Joined.parts is empty; expected at least one credit by name")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        got = {name: part.assign(forest, scores, valid, channels) for name, part in self.parts.items()}
        return EdgeValues(
            torch.cat([part.values for part in got.values()], 1),
            torch.cat([part.valid for part in got.values()], 1),
            tuple(f"{name}/{channel}" for name, part in got.items() for channel in part.channels),
        )
