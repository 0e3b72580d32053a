"""DPM-Solver++(2M) as diffusers' DPMSolverMultistepScheduler steps it: the solver of SANA."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import DEFAULT_CONTEXT, Carry, Step, TransitionContext, bind_rectified_flow, check_choices
from samplers.kernels.gaussian import Constants, Reduce, spread
from samplers.kernels.multistep import first_order, log_snr, solved, solver_inputs
from samplers.transfer import send


@dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++(2M), midpoint form (2211.01095, algorithm 2); every step is deterministic.

    With λ = ln((1-σ)/σ), h = λ' - λ and r = (λ - λ₋)/h: x' = (σ'/σ)·x - (1-σ')(e^{-h} - 1)·(x̂0 + (x̂0 - x̂0₋)/2r).
    First order: without history and at σ' = 0, where x' = x̂0. In fp32 on the CPU it is, bit for bit, diffusers'
    DPMSolverMultistepScheduler with algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", flow sigmas and flow
    prediction, final_sigmas_type="zero". DPMSolver is the same formula beside a stochastic kernel, equal up to rounding.
    Not kept: replay, since the history of a step is not stored.
    """

    reduce: Reduce = "mean"
    constants: Constants = "none"
    uses_roots = False

    def __post_init__(self) -> None:
        check_choices(self.reduce, self.constants)

    bind = bind_rectified_flow
    coefficients = first_order

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        ctx: TransitionContext = DEFAULT_CONTEXT,
    ) -> Step:
        """carry: (x̂0,), and its σ [N]."""
        x, v, sigma, sigma_next = solver_inputs(self, x, v, sigma, sigma_next, ctx)
        h = log_snr(sigma_next) - log_snr(sigma)
        shrink, gain = sigma_next / sigma, (1 - sigma_next) * (torch.exp(-h) - 1.0)
        half, inverse = torch.zeros_like(gain), torch.zeros_like(gain)  # of first-order rows
        if ctx.carry is not None:
            second = sigma_next > 0
            half = torch.where(second, 0.5 * gain, half)
            inverse = torch.where(second, 1.0 / ((log_snr(sigma) - log_snr(ctx.carry.sigma.to(sigma))) / h), inverse)
        slope = sigma * (gain + half * inverse)
        velocity_coef, step_size, *coefficients = send(
            x.device, slope, sigma - sigma_next, sigma, shrink, gain, half, inverse
        )
        level, shrink, gain, half, inverse = (spread(each, x) for each in coefficients)
        x0 = x - level * v
        mean = shrink * x - gain * x0
        if ctx.carry is not None:
            (x0_before,) = ctx.carry.states
            mean = mean - half * (inverse * (x0 - x0_before))
        return solved(self, mean, velocity_coef, step_size, Carry((x0,), sigma))
