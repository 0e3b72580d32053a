"""Step weights: what an edge's loss is multiplied by.

At ratio 1 the gradient of an edge is (b/s)·z/D, with b = ∂μ/∂v (velocity_coef), s the std, z the step's unit noise and D
elements. |b|/s differs 26-fold over the steps of SD3's grid (T = 10, Flow-SDE a = 0.7); with constants "none" the gradient
is 2·s² times that. Scales named below are those of full constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from samplers import Forest, Gaussian, Path, Step, send
from samplers.kernels.flow_sde import near_one


class StepWeight(Protocol):
    def check(self, path: Path) -> None:
        """ValueError unless its formula holds for a policy on `path`."""
        ...

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        """Weights [E], >= 0, of the transitions in `step`, which arrived at `edges` [E]."""
        ...


def on_any_path(weight: StepWeight, path: Path) -> None:
    """The `check` of a weight whose formula holds on every path."""


@dataclass(frozen=True)
class Uniform:
    """1: gradient scale |b|/s (Flow-GRPO 2505.05470, DanceGRPO 2505.07818, MixGRPO 2507.21802)."""

    check = on_any_path

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        return torch.ones_like(step.std)


@dataclass(frozen=True)
class FlatGradient:
    """s/|b|: the same gradient scale at every step, for every kernel (our generic form).

    1/(2s|b|) where the log-prob has no constants (CPS by default), 0 at its step without noise."""

    check = on_any_path

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        flat = step.std / step.policy.velocity_coef.abs()
        if step.policy.constants == "full":
            return flat
        return torch.where(step.std > 0, flat / (2 * step.std.square()), 0.0)  # such a log-prob moves 2s² times as much


@dataclass(frozen=True)
class MeanOne:
    """`weight` / its mean over all stochastic steps of the rollout, of all prompts and processes (Flash-GRPO 2605.15980,
    temporal gradient rectification): it divides the gradient among the steps that this iteration drew, and leaves its
    size to the learning rate. With FlatGradient it is (1/c)/mean(1/c), c = |b|/s.

    Not kept: selectors. The mean is also over steps that are then not trained."""

    weight: StepWeight = field(default_factory=FlatGradient)

    def check(self, path: Path) -> None:
        self.weight.check(path)

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        everywhere = self.weight.weigh(without_states(forest), forest, forest.tree.edges)
        return self.weight.weigh(step, forest, edges) / everywhere.mean()


def without_states(forest: Forest) -> Step:
    """All stochastic steps of a forest with their coefficients, and one 0 in place of each mean."""
    tree, (sigma, sigma_next) = forest.tree, forest.step_sigmas(forest.tree.edges)
    affine = forest.kernel.coefficients(sigma, sigma_next, tree.level[tree.edges], tree.index[tree.parent[tree.edges]])
    std, coef, size = (values.float() for values in (affine.std, affine.velocity_coef, sigma - sigma_next))
    gaussian = Gaussian(std.new_zeros(len(std), 1), std, coef, size, forest.kernel.reduce, forest.kernel.constants)
    return Step(gaussian, gaussian)


@dataclass(frozen=True)
class InverseLength:
    """1/h (GRPO-Guard's weight, 2510.22319, meant for its normalized ratio)."""

    check = on_any_path

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        return 1 / step.policy.step_size


@dataclass(frozen=True)
class StdOverMean:
    """s / mean of s over all steps but the last (TempFlow-GRPO's noise-aware weight, 2508.04324): gradient scale ∝ |b|.

    The mean is that of the kernel's own noise level. Where a plan has other levels (Leveled, so after a calibration, or
    TreeWindow's growth) s is the step's, and weights do not have mean 1."""

    check = on_any_path

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        sigmas = forest.sigmas.double()
        if len(sigmas) < 3:
            raise ValueError("got a grid of one step for StdOverMean; expected two steps or more: take Uniform")
        level, index = torch.ones_like(sigmas[:-2]), torch.arange(len(sigmas) - 2, device=sigmas.device)
        coefficients = forest.kernel.coefficients(sigmas[:-2], sigmas[1:-1], level, index)
        return step.std / coefficients.std.mean().to(step.std.dtype)


@dataclass(frozen=True)
class LongCat:
    """√(σ/(1−σ))/√h (LongCat-Video, 2510.22200): flat gradients with Flow-SDE, whatever its noise level.

    loss_reweighting in GenRL. At the first step of the grid (index 0) σ' stands for σ inside 1−σ where Flow-SDE does so, whose
    gradients are 1/(1 + a²/2) of the others there, .80 at a = .7. Not kept: the KL's weight (its square), and flatness
    where steps have levels of their own."""

    def check(self, path: Path) -> None:
        if not path.rectified:
            raise ValueError(
                f"got step_weight=LongCat for a policy on {type(path).__name__}; its formula is that of a rectified "
                "flow: take FlatGradient"
            )

    def weigh(self, step: Step, forest: Forest, edges: Tensor) -> Tensor:
        sigma, sigma_next = (values.double() for values in forest.step_sigmas(edges))
        first = (forest.tree.index[forest.tree.parent[edges]] == 0).to(sigma.device)
        bounded = torch.where(first & near_one(sigma, sigma_next), sigma_next, sigma)
        return send(step.std.device, (sigma / (1 - bounded) / (sigma - sigma_next)).sqrt().to(step.std.dtype))[0]
