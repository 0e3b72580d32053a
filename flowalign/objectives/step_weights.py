"""Step weights: what an edge's loss is multiplied by (the table of grpo_family §1.5).

At ratio 1 the gradient of an edge is (slope/std)·z/D, whose size differs 26-fold over the steps of one grid; with
constants "none" it is 2·std² times that. Scales named below are those of full constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers import Forest, Step


class StepWeight(Protocol):
    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        """Weights [E] of the transitions in `step`, which arrived at `edges` [E]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """1: gradient scale |b|/s (Flow-GRPO, DanceGRPO, MixGRPO)."""

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        return torch.ones_like(step.std)


@dataclass(frozen=True)
class FlatGradient:
    """s/|b|: the same gradient scale at every step, for every kernel (our generic form).

    1/(2s|b|) where the log-prob has no constants (CPS by default), 0 at its step without noise."""

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        flat = step.std / step.policy.slope.abs()
        if step.policy.constants == "full":
            return flat
        return torch.where(step.std > 0, flat / (2 * step.std.square()), 0.0)  # such a log-prob moves 2s² times as much


@dataclass(frozen=True)
class InverseLength:
    """1/h (GRPO-Guard's weight, meant for its normalised ratio)."""

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        return 1 / step.policy.length


@dataclass(frozen=True)
class StdOverMean:
    """s / mean of s over all steps but the last (TempFlow-GRPO's noise-aware weight): gradient scale ∝ |b|."""

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        sigmas = forest.sigmas.double()
        coefficients = forest.kernel.coefficients(sigmas[:-2], sigmas[1:-1], torch.ones_like(sigmas[:-2]))
        return step.std / coefficients.std.mean().to(step.std)


@dataclass(frozen=True)
class LongCat:
    """√(σ/(1−σ))/√h (LongCat-Video's loss_reweighting, in GenRL): flat gradients with Flow-SDE, whatever its noise level.

    Where σ is 1 the σ' of the step stands for it inside 1−σ, as in Flow-SDE. The KL's weight (its square) is not kept."""

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        sigma, sigma_next = (values.double() for values in forest.step_sigmas(edges))
        capped = torch.where(sigma == 1, sigma_next, sigma)
        return (sigma / (1 - capped) / (sigma - sigma_next)).sqrt().to(step.std)
