"""Shared by the kernel tests: the affine kernels by name, and exact steps of Gaussian data on any path."""

from collections.abc import Callable

import torch
from torch import Tensor

from samplers import (
    CPS,
    DDIM,
    ClippedFlowSDE,
    DanceSDE,
    FlowSDE,
    Kernel,
    LinearSDE,
    Path,
    RectifiedFlow,
    StepwiseSDE,
    VariancePreserving,
)

F64 = torch.float64
FLOW = RectifiedFlow()
# ten levels of ᾱ from 0.95 (σ = 0.1) down to 0.05 (σ = 1)
VP = VariancePreserving(torch.linspace(0.95, 0.05, 10, dtype=F64))

EULER_MARUYAMA: dict[str, Kernel] = {
    "flow": FlowSDE(0.7),
    "clipped": ClippedFlowSDE(0.7, max_std=0.2),
    "dance": DanceSDE(0.3),
    "linear": LinearSDE(0.1, 0.9),
}
PRESERVING: dict[str, Kernel] = {
    "cps": CPS(0.7, constants="full"), "ddim": DDIM(0.6).bind(VP), "stepwise": StepwiseSDE(0.7)
}  # fmt: skip
KERNELS: dict[str, Kernel] = {**EULER_MARUYAMA, **PRESERVING}


def path_of(name: str) -> Path:
    """The path a kernel of KERNELS is on."""
    return VP if name == "ddim" else FLOW


def rows(*values: float) -> Tensor:
    """[N, 1] float64, one element a row."""
    return torch.tensor(values, dtype=F64)[:, None]


def bed(path: Path, m: float = 0.5, delta: float = 0.8) -> tuple[Callable[..., Tensor], Callable[[float], float]]:
    """(exact velocity of data N(m, δ²) on `path`, variance V(σ) of its marginal)."""

    def marginal(sigma: float) -> float:
        a, b, _, _ = path.mix(torch.tensor(sigma, dtype=F64))
        return float(a**2 * delta**2 + b**2)

    def velocity(x: Tensor, sigma: Tensor, root: Tensor | None = None) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=F64).expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        a, b, c, d = path.mix(sigma)
        gap, variance = x - a * m, a**2 * delta**2 + b**2
        x0, eps = m + a * delta**2 / variance * gap, b / variance * gap
        return c * x0 + d * eps

    return velocity, marginal


def moments(
    kernel: Kernel, velocity: Callable[..., Tensor], mean: float, variance: float, sigma: float, then: float
) -> tuple[float, float]:
    """Mean and variance after one step, exactly: for Gaussian data the map x -> x' is affine in x, so two points determine it."""
    x = rows(mean, mean + 1.0)
    step = kernel(x, velocity(x, torch.tensor(sigma, dtype=F64)), sigma, then)
    at, above = step.behavior.mean.flatten().tolist()
    return at, (above - at) ** 2 * variance + float(step.std[0]) ** 2
