"""What the deterministic multistep solvers UniPC and DPMSolver2M share: their inputs, checked, and the step they return.

Coefficients are computed on the host, in the dtype of the states (at least fp32), as diffusers' schedulers compute theirs from fp32
levels: so an fp32 step on the CPU is the scheduler's bit for bit. Only their first step is a one-step map: `first_order`.
"""

import torch
from torch import Tensor

from samplers.kernels.base import Affine, Carry, Kernel, Step, TransitionContext, per_row, states_of, step_inputs
from samplers.kernels.gaussian import Gaussian


def first_order(
    kernel: Kernel, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
) -> Affine:
    """(1, -h, 0): the step without history, Euler's. ValueError for a level above 0: the solver draws no noise."""
    sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
    if bool((level > 0).any()):
        raise ValueError(
            f"got {type(kernel).__name__} for stochastic steps (level {float(level.max()):g}); expected level 0 in every row, since "
            "it draws no noise: take samplers.Deterministic as the plan, or a stochastic kernel such as samplers.FlowSDE"
        )
    return Affine(alpha=torch.ones_like(sigma), velocity_coef=sigma_next - sigma, std=torch.zeros_like(sigma))


def solver_inputs(
    kernel: Kernel, x: Tensor, v: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, ctx: TransitionContext
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, v [N, *] in at least fp32 and σ, σ' [N] in the same dtype. ValueError for stochastic rows, for the replay of a step that
    would need its history, and for what no kernel takes."""
    x, v = states_of(x, v)
    sigma, sigma_next = per_row("sigma", sigma, len(x)), per_row("sigma_next", sigma_next, len(x))
    kernel.coefficients(sigma, sigma_next, per_row("level", ctx.level, len(x)), ctx.step)
    if ctx.replay:
        refuse_replay(kernel, sigma_next > 0)
    return x, v, sigma.to(x.dtype), sigma_next.to(x.dtype)


def solved(kernel: Kernel, mean: Tensor, velocity_coef: Tensor, step_size: Tensor, carry: Carry) -> Step:
    """The step to mean [N, *] without noise; velocity_coef, step_size [N] beside it."""
    std = mean.new_zeros(len(mean))
    on_host = torch.zeros(len(mean), dtype=mean.dtype)
    gaussian = Gaussian(mean, std, velocity_coef, step_size, kernel.reduce, kernel.constants, on_host)
    return Step(policy=gaussian, behavior=gaussian, carry=carry)


def refuse_replay(kernel: Kernel, rows: Tensor) -> None:
    """ValueError if any of `rows` [N] bool is True: deterministic steps of a multistep solver that are replayed."""
    if bool(rows.any()):
        raise ValueError(
            f"got the replay of deterministic {type(kernel).__name__} steps (rows {rows.nonzero().flatten()[:8].tolist()}); expected "
            "stochastic ones: a forest does not store the history of multistep rows"
        )


def log_snr(sigma: Tensor) -> Tensor:
    """λ = ln(1-σ) - ln σ of a rectified flow; infinite at the ends."""
    return torch.log(1 - sigma) - torch.log(sigma)
