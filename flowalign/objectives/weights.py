"""Step weights: what an edge's loss is multiplied by (the table of grpo_family §1.5).

At ratio 1 the gradient of an edge is (slope/std)·z/D, whose size differs 26-fold over the steps of one grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers import Forest, Step


class StepWeight(Protocol):
    def weigh(self, step: Step, forest: Forest) -> Tensor:
        """Weights [E] of the transitions in `step`."""
        ...


@dataclass(frozen=True)
class Uniform:
    """1: gradient scale |b|/s (Flow-GRPO, DanceGRPO, MixGRPO)."""

    def weigh(self, step: Step, forest: Forest) -> Tensor:
        return torch.ones_like(step.std)


@dataclass(frozen=True)
class FlatGradient:
    """s/|b|: the same gradient scale at every step, for every kernel (our generic form)."""

    def weigh(self, step: Step, forest: Forest) -> Tensor:
        return step.std / step.policy.slope.abs()


@dataclass(frozen=True)
class InverseLength:
    """1/h (GRPO-Guard's weight, meant for its normalised ratio)."""

    def weigh(self, step: Step, forest: Forest) -> Tensor:
        return 1 / step.policy.length


@dataclass(frozen=True)
class StdOverMean:
    """s / mean of s over all steps but the last (TempFlow-GRPO's noise-aware weight): gradient scale ∝ |b|."""

    def weigh(self, step: Step, forest: Forest) -> Tensor:
        sigmas = forest.sigmas.double()
        coefficients = forest.kernel.coefficients(sigmas[:-2], sigmas[1:-1], torch.ones_like(sigmas[:-2]))
        return step.std / coefficients.std.mean().to(step.std)
