"""Step weights from how sure a reward is: of the leaves below a step, or of its own states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.credit.base import uncertainty_of
from flowalign.objectives.step_weights import StepWeight, Uniform
from samplers import Forest, Path, Step, send


@dataclass(frozen=True)
class Certainty:
    """weight · mean over the scored leaves below the step of exp(−u/scale), u >= 0 being a leaf's uncertainty (Ctrl-U,
    2410.11236, weighs the loss of an image so).

    scale: in the units of the score; at u = scale a leaf counts 1/e. channel: of the reward whose uncertainty is read; a
    reward with one channel need not say. weight: what is multiplied, per step; None is Uniform. A step without a leaf whose uncertainty is
    known gets 0. Not kept: the weight lowers a step's share of the gradient, its advantage is still that of all scores.
    ValueError, in the first update, for a reward that states no uncertainty in the channel."""

    scale: float = 1.0
    channel: str | None = None
    weight: StepWeight | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"got Certainty.scale={self.scale}; expected a number above 0, in the units of the score")

    def check(self, path: Path) -> None:
        if self.weight is not None:
            self.weight.check(path)

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        tree, known = forest.tree, forest.scores[self._name(forest)][forest.tree.leaves]
        edge, leaf = tree.leaf_of_edge
        sure = (-known.double() / self.scale).exp()[leaf]
        scored = sure.isfinite()
        total, count = (torch.zeros(len(tree.edges), dtype=torch.float64) for _ in range(2))
        total.index_add_(0, edge, torch.where(scored, sure, 0.0))
        count.index_add_(0, edge, scored.double())
        own = (self.weight or Uniform()).weigh(step, forest, edges)
        sureness = (total / count.clamp(min=1))[torch.searchsorted(tree.edges, edges)].to(own.dtype)
        return own * send(own.device, sureness)[0]

    def _name(self, forest: Forest) -> str:
        stated = sorted(name for name in forest.scores if name.startswith(uncertainty_of("")))
        asked = [uncertainty_of(self.channel)] if self.channel is not None else stated
        if len(asked) != 1 or asked[0] not in stated:
            raise ValueError(
                f"got Certainty.channel={self.channel} and a reward that states {stated or 'no uncertainty'}; expected one of "
                "its channels: set `channel`, take a reward with an uncertainty, or another step_weight"
            )
        return asked[0]


@dataclass(frozen=True)
class Agreement:
    """weight · exp(−u/scale), u = |s(state after) − s(state before)|: how far a reward of completions (rewards.OnCompletion under
    process_rewards) changes its mind in one step about what the sample will be.

    Ctrl-U (2410.11236) scores the x0-predictions of one image at two adjacent noise levels and weighs its loss so; ours takes
    the two states of the step, which differ in the step's noise too. Its + u, which keeps a loss from raising its own u, has
    no place here: the weight is a constant of the update. For losses through a differentiable reward see rewards.ctrl_u.

    score: the channel, x0_clip_score, say. scale: in its units; at u = scale a step counts 1/e. weight: what is multiplied;
    None is Uniform. A step gets 0 where one of its states has no score (max_sigma). ValueError for a channel that no
    process reward has."""

    score: str
    scale: float = 1.0
    weight: StepWeight | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"got Agreement.scale={self.scale}; expected a number above 0, in the units of the score")

    def check(self, path: Path) -> None:
        if self.weight is not None:
            self.weight.check(path)

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        if self.score not in forest.scores:
            raise ValueError(
                f"got Agreement.score={self.score!r} and process_rewards with the channels {sorted(forest.scores)}; expected one of "
                "them: put rewards.OnCompletion under process_rewards"
            )
        known = forest.scores[self.score].double()
        sure = (-(known[edges] - known[forest.tree.parent[edges]]).abs() / self.scale).exp()
        own = (self.weight or Uniform()).weigh(step, forest, edges)
        return own * send(own.device, sure.nan_to_num(nan=0.0).to(own.dtype))[0]
