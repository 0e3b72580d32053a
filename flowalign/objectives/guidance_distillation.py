"""Distillation of reward guidance into the velocity, so that sampling needs no reward (Euphonium, arXiv 2602.04928)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flowalign.objectives.supervision import Targets, check_fade, faded
from samplers import Forest, Held, Path
from samplers.kernels.base import spread
from samplers.kernels.guided import GRADIENTS, RATE


@dataclass(frozen=True)
class GuidanceDistillation:
    """⟨(v − v_T)²⟩ at the trained states of a guided rollout, v_T the rollout's velocity with the guidance in it.

    target "sde_mean": v_old + (λ/b)·∇ρ, under which the kernel's own mean is the guided one: the same samples without the
    reward, by this kernel, grid and noise level. "marginal": v_old − σ/(1−σ)·∇ρ/β, which tilts the marginals by e^{ρ/β}
    whatever the sampler: for the ODE; σ/(1−σ) is held at `max_odds`, beyond which one state would outweigh all others.
    Our reading: the abstract says that guidance is distilled, the released code has no such loss; both targets are derived
    (b from μ = αx + bv, the tilt from the score). ∇ρ is what the rollout kept: nothing is evaluated again.

    scale: a factor of the term; it falls linearly to 0 over `fade` iterations (null: stays). beta: of "marginal" only; 3.125
    is the temperature of the released λ. Not kept: a fixed point. Each rollout adds the guidance to what the policy has
    become, so ρ is climbed as long as the term is on: fade it, or hold the policy by a KL.
    Siblings that leave one state at different noise levels share the mean of their λ/b."""

    target: Literal["sde_mean", "marginal"] = "sde_mean"
    scale: float = 1.0
    fade: int | None = None
    beta: float = 3.125
    max_odds: float = 10.0
    needs_old = True
    needs_guidance = True
    role = None

    def __post_init__(self) -> None:
        if self.target not in ("sde_mean", "marginal"):
            raise ValueError(f"got target={self.target!r}; expected 'sde_mean' or 'marginal'")
        check_fade(self.scale, self.fade)
        if not (self.beta > 0 and self.max_odds > 0):
            raise ValueError(f"got beta={self.beta}, max_odds={self.max_odds}; expected both above 0")

    def check(self, path: Path, channels: tuple[str, ...]) -> None:
        """ValueError for "marginal" on a path whose score moves the velocity by another factor."""
        if self.target == "marginal" and not path.rectified:
            raise ValueError(
                f"got GuidanceDistillation with target=marginal for a policy on {type(path).__name__}; its formula is that of "
                "a rectified flow: take sde_mean"
            )

    def scale_at(self, iteration: int) -> float:
        """The factor in this iteration."""
        return faded(self.scale, self.fade, iteration)

    def targets(self, forest: Forest, scores: Tensor, valid: Tensor) -> Targets:
        """v_T at every guided state that a stochastic step leaves, weight 1; the scores of leaves do not matter."""
        if GRADIENTS not in forest.velocities or "old" not in forest.velocities:
            raise ValueError(
                f"got a forest with the velocities {sorted(forest.velocities)}; expected 'old' and {GRADIENTS!r}: set "
                "rollout.reward_guidance, and collect with keep_velocities=True"
            )
        found, old_rows = forest.velocities[GRADIENTS], forest.velocities["old"]
        nodes = found.known.nonzero().flatten()
        here = (found.here & old_rows.here)[nodes]
        own = nodes[here]
        gradient, old = found.at(own), old_rows.at(own)
        sigma = forest.sigma(own).double()
        factor = forest.scores[RATE][own]
        if self.target == "marginal":
            factor = -(sigma / (1 - sigma)).clamp(max=self.max_odds) / self.beta
        moved = old + spread(factor.to(old), old) * gradient.to(old)
        return Targets(nodes, Held.of(moved, here), sigma.new_ones(len(nodes)))
