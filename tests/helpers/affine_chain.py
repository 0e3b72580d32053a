"""A Gaussian flow with an exact, affine velocity and one trained shift per step: laws, tilts and optima in closed form.

Data N(mean, std²) in each of D independent elements. v_θ(x, σ_k) = A_k·x + C_k + θ_k with the exact velocity A_k·x + C_k, so
a step of a kernel (a, b, s) is x' = M_k·x + b_k·(C_k + θ_k) + s_k·ξ, M_k = a_k + b_k·A_k. For the reward w·Σ x_T the KL-regularized
optimum over trajectories is reached by shifts of the mean δ_k = s_k²·α_{k+1}/β with α_T = w, α_k = M_k·α_{k+1}: log π*/reference of
a path is then w·x_T/β minus what depends on its start alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowalign.data import PromptRecord
from flowalign.models.base import Size
from flowalign.models.conditions import Conditions
from flowalign.rollouts.task import Rollout, Task
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import FlowSDE, Kernel, RectifiedFlow
from tests.helpers.roles import switch_role

F64 = torch.float64


@dataclass(frozen=True)
class Affine:
    """The closed forms of `steps` steps of `kernel` on a linear grid; `noisy`: the stochastic ones (None: all). Tensors [T]."""

    kernel: Kernel = field(default_factory=lambda: FlowSDE(0.7, reduce="sum"))
    steps: int = 10
    mean: float = 0.7
    std: float = 0.5
    noisy: Collection[int] | None = None

    @property
    def sigmas(self) -> Tensor:
        """[T+1] fp32."""
        return torch.linspace(1, 0, self.steps + 1)

    def slope(self, sigma: Tensor) -> Tensor:
        """A(σ) = (σ − (1−σ)·std²)/V, V = (1−σ)²·std² + σ²."""
        left = 1 - sigma
        return (sigma - left * self.std**2) / (left**2 * self.std**2 + sigma**2)

    def offset(self, sigma: Tensor) -> Tensor:
        """C(σ) = −A·(1−σ)·mean − mean."""
        return -self.slope(sigma) * (1 - sigma) * self.mean - self.mean

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, s of the steps, float64."""
        grid, numbers = self.sigmas.double(), torch.arange(self.steps)
        noisy = set(range(self.steps) if self.noisy is None else self.noisy)
        level = torch.tensor([float(step in noisy) for step in range(self.steps)], dtype=F64)
        found = self.kernel.coefficients(grid[:-1], grid[1:], level, numbers)
        return found.alpha, found.velocity_coef, found.std

    def gains(self) -> Tensor:
        """M_k = a_k + b_k·A_k."""
        a, b, _ = self.coefficients()
        return a + b * self.slope(self.sigmas[:-1].double())

    def sensitivities(self, weight: float = 1.0) -> Tensor:
        """α_0 … α_T [T+1]: the derivative of weight·E[x_T] by x_k."""
        found = [torch.tensor(weight, dtype=F64)]
        for gain in reversed(self.gains()):
            found.insert(0, gain * found[0])
        return torch.stack(found)

    def optimum(self, weight: float, beta: float) -> Tensor:
        """θ* = δ_k/b_k for the reward weight·Σ x_T and beta·KL in nats; 0 where a step is deterministic."""
        _, b, s = self.coefficients()
        return s.square() * self.sensitivities(weight)[1:] / (beta * b)

    def moments(self, shifts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance, and variance given the start, of x_T from x_0 ~ N(0, 1) under the shifts θ (None: 0)."""
        _, b, s = self.coefficients()
        alpha, sigma = self.sensitivities(), self.sigmas[:-1].double()
        pushes = b * (self.offset(sigma) + (torch.zeros_like(b) if shifts is None else shifts.double()))
        given = (s * alpha[1:]).square().sum()
        return (alpha[1:] * pushes).sum(), given + alpha[0].square(), given

    def kl(self, shifts: Tensor) -> Tensor:
        """KL(π_θ ‖ reference) of a trajectory, per element, in nats."""
        _, b, s = self.coefficients()
        noisy = s > 0
        return (b * shifts.double())[noisy].square().div(2 * s[noisy].square()).sum()


@dataclass(eq=False)
class AffinePolicy:
    """A policy of `law` with float64 shifts per role: "policy" trained, "reference" 0; others may be added. Latents [D, 1, 1]."""

    law: Affine = field(default_factory=Affine)
    elements: int = 1
    evaluations: int = 0
    padded: int = 0
    sampling: None = None
    active: str = "policy"
    path: RectifiedFlow = field(default_factory=RectifiedFlow)

    def __post_init__(self) -> None:
        zero = torch.zeros(self.law.steps, dtype=F64)
        self.shifts: dict[str, Tensor] = {"policy": nn.Parameter(zero.clone()), "reference": zero}

    @property
    def theta(self) -> Tensor:
        """The trained shifts [T]."""
        return self.shifts["policy"]

    def set(self, shifts: Tensor) -> None:
        """Sets the trained shifts."""
        with torch.no_grad():
            self.theta.copy_(shifts)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (self.elements, 1, 1)

    def encode(
        self,
        records: Sequence[PromptRecord],
        *,
        negative: bool = False,
        together: bool = False,
        size: Size | None = None,
    ) -> Conditions:
        return Conditions({"row": torch.zeros(len(records), 1)})

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return torch.linspace(1, 0, num_inference_steps + 1)

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        """Float64; a σ off the grid takes the shift of the nearest step."""
        self.evaluations += len(x)
        return self.exact(x, sigma) + self._shift(sigma).reshape(-1, *[1] * (x.ndim - 1))

    def exact(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity without shifts."""
        rows = [part(sigma.double()).reshape(-1, *[1] * (x.ndim - 1)) for part in (self.law.slope, self.law.offset)]
        return rows[0] * x.double() + rows[1]

    def _shift(self, sigma: Tensor) -> Tensor:
        step = (sigma.double()[:, None] - self.law.sigmas[:-1].double()[None]).abs().argmin(1)
        return self.shifts[self.active][step]

    role = switch_role

    def parameters_of(self, role: str) -> list[tuple[str, nn.Parameter]]:
        shifts = self.shifts[role]
        assert isinstance(shifts, nn.Parameter)
        return [("shifts", shifts)]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.parameters_of("policy")

    def follow(self, step: int) -> None: ...

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        raise AssertionError("rewards of the chain read latents")


@dataclass(frozen=True)
class LinearReward:
    """weight·Σ of the elements of a sample; samples with a sum above `invalid_above` have no score."""

    weight: float = 1.0
    invalid_above: float = float("inf")
    name: str = "linear"
    spec = RewardSpec(("latents",), differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        total = batch.latents.flatten(1).sum(1)
        return RewardOutput(self.weight * total, total <= self.invalid_above)


def chain_task(policy: AffinePolicy, rollout: Rollout, reward: LinearReward | None = None, seed: int = 0) -> Task:
    """A task of one-word prompts, as many as the rollout has groups."""
    prompts = [PromptRecord(number, f"prompt {number}") for number in range(rollout.groups)]
    return Task(policy, reward or LinearReward(), rollout, seed, Size(1, 1), prompts=prompts)  # type: ignore[arg-type]
