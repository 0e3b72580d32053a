"""Distillation beside a policy gradient: velocities at trained states are pulled to a teacher's (KEPO 2602.00400 for flows)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.objectives.gate import Gate
from flowalign.objectives.matching import Match, Steps
from flowalign.objectives.supervision import Targets, check_fade, faded
from samplers import Forest, Path, RectifiedFlow, mean_below


@dataclass(frozen=True)
class TeacherTargets:
    """scale · w·⟨(v − v_m)²⟩ at the trained states, v_m the velocity of the role `role` there, with the rollout's guidance; the
    mean over elements.

    match: w; a state that several steps leave has the mean of theirs. gate: counts only samples that are good enough; a state
    that some kept and some other samples pass has the share of those that are kept. None: all. The mean is over the states
    that a kept sample passes. scale falls linearly to 0 over `fade` iterations (null: stays).
    With a policy gradient that is KEPO's loss, GRPO + gated distillation; its second half, samples of a hinted student in the
    group, is samplers.Sourced. Our reading for flows: the paper is about language models."""

    role: str
    scale: float = 1.0
    match: Match = field(default_factory=Match)
    gate: Gate | None = None
    fade: int | None = None
    needs_old = False
    needs_guidance = False

    def __post_init__(self) -> None:
        check_fade(self.scale, self.fade)
        if self.match.normalized or (self.gate is not None and self.gate.least != 1):
            raise ValueError(
                f"got {self}; expected match.normalized=false and gate.least=1, since this term has neither"
            )

    def check(self, path: Path, channels: tuple[str, ...]) -> None:
        """ValueError for a gate with several channels, and for form x0 on a path whose formula is another."""
        if self.gate is not None and (len(channels) > 1 or self.gate.column(channels)):
            raise ValueError(
                f"got TeacherTargets with a gate and the rewards {list(channels)}; expected one, which it reads"
            )
        if self.match.form == "x0" and not path.rectified:
            raise ValueError(
                f"got TeacherTargets with form=x0 on {type(path).__name__}; expected another form, such as kl"
            )

    def scale_at(self, iteration: int) -> float:
        """The factor in this iteration."""
        return faded(self.scale, self.fade, iteration)

    def targets(self, forest: Forest, scores: Tensor, valid: Tensor) -> Targets:
        """The teacher's velocities at all trained states that a kept sample passes."""
        if self.role not in forest.velocities:
            raise ValueError(
                f"got a forest with the velocities {sorted(forest.velocities)}; expected those of {self.role!r}"
            )
        tree, edges = forest.tree, forest.tree.edges
        weight = torch.zeros(len(tree), dtype=torch.float64)
        steps = Steps(tree.parent[edges], *forest.step_sigmas(edges), tree.level[edges], tree.index[tree.parent[edges]])
        number = torch.bincount(steps.nodes, minlength=len(tree))
        weight.index_add_(0, steps.nodes, self.match.weight(forest.kernel, RectifiedFlow(), steps))
        weight = weight / number.clamp(min=1)
        if self.gate is not None:
            kept = torch.zeros(len(tree), dtype=torch.float64)
            kept[tree.leaves] = self.gate.keeps(scores[:, 0], valid[:, 0]).double()
            weight = weight * mean_below(tree, kept)
        nodes = (forest.velocities[self.role].known & (weight > 0)).nonzero().flatten()
        return Targets(nodes, forest.velocities[self.role].pick(nodes), weight[nodes])
