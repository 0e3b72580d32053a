"""Credit from ODE completions: what one stochastic step changed, V(state) being the score of its completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import EdgeValues, completed, largest_of_each_sign, lines
from samplers import Forest


@dataclass(frozen=True)
class Gain:
    """V_{i+1} − V_i for the step i (DenseGRPO 2601.20218); over a whole chain the gains sum to V_T − V_0.

    kind "value": V_{i+1} itself, the paper's control, better than the terminal reward and worse than the gain."""

    kind: Literal["gain", "value"] = "gain"

    def __post_init__(self) -> None:
        if self.kind not in ("gain", "value"):
            raise ValueError(f"got Gain.kind={self.kind!r}; expected 'gain' or 'value'")

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        tree = forest.tree
        after, reached = completed(tree, tree.edges, scores, valid)
        if self.kind == "value":
            return EdgeValues(after, reached, channels)
        before, left = completed(tree, tree.parent[tree.edges], scores, valid)
        both = left & reached
        return EdgeValues(torch.where(both, after - before, 0.0), both, channels)


@dataclass(frozen=True)
class TurningPoint:
    """The gain of a step, d_k = V_{k+1} − V_k; at a turning point all that follows too, V_n − V_k (TP-GRPO 2602.06422).

    Let Δ = V_n − V_0. Step k >= 1 is a turning point if d_{k-1} has the opposite sign of Δ, and d_k and V_n − V_{k+1} both
    have the sign of Δ. Step 0 (`first_step`) is one if V_n − V_1 has the sign of d_0. Zero has no sign, so a binary reward
    has few turning points. `balanced`: of the batch's turning points keep as many with a positive as with a negative
    value, those of largest magnitude (the authors' code ranks by |Δ|, per micro-batch); the others get d_k.
    Valid where V is known before and after the step and the step before it, at the start and at the end. ValueError on
    trees that branch on the way: V_n would not be one sample."""

    first_step: bool = True
    balanced: bool = True

    def assign(self, forest: Forest, scores: Tensor, valid: Tensor, channels: tuple[str, ...]) -> EdgeValues:
        tree = forest.tree
        line = lines(tree)
        inner = line.above >= 0
        if len(line.above[inner].unique()) != int(inner.sum()):
            raise ValueError(
                "TurningPoint needs chains: a stochastic step of this tree is followed by several; take Gain"
            )
        before, left = completed(tree, tree.parent[tree.edges], scores, valid)
        after, reached = completed(tree, tree.edges, scores, valid)
        gain, to_the_end, rest = after - before, after[line.last] - before, after[line.last] - after
        agrees = gain.sign() * (after[line.last] - before[line.first]).sign()
        goes_on = gain.sign() * rest.sign() > 0
        previous = line.above.clamp(min=0)
        turned = torch.where(inner[:, None], (agrees[previous] < 0) & (agrees > 0), self.first_step) & goes_on
        both = left & reached
        valid_edge = both & reached[line.last] & left[line.first] & (both[previous] | ~inner[:, None])
        turned &= valid_edge
        if self.balanced:
            picked = [largest_of_each_sign(r, here) for r, here in zip(to_the_end.T, turned.T, strict=True)]
            turned = torch.stack(picked, 1)
        values = torch.where(turned, to_the_end, gain)
        return EdgeValues(torch.where(valid_edge, values, 0.0), valid_edge, channels)
