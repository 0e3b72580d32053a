"""UniPC as diffusers' UniPCMultistepScheduler steps it: the solver of Wan 2.1 and 2.2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import DEFAULT_CONTEXT, Carry, Step, TransitionContext, bind_rectified_flow, check_choices
from samplers.kernels.gaussian import Constants, Reduce, spread
from samplers.kernels.multistep import first_order, log_snr, solved, solver_inputs
from samplers.transfer import send


@dataclass(frozen=True)
class UniPC:
    """UniPC-2 with B₂(h) = e^h - 1, data prediction (2302.04867); every step is deterministic.

    With λ = ln((1-σ)/σ), a step from σ to σ' has h = λ' - λ, g = (1-σ')(e^{-h} - 1) and r = (λ₋ - λ)/h < 0:
        predictor  x'  = (σ'/σ)·x - g·x̂0 - g·(x̂0₋ - x̂0)/2r
        corrector  x'ᶜ = (σ'/σ)·x - g·x̂0 - g·(ρ₁·(x̂0₋ - x̂0)/r + ρ₂·(x̂0' - x̂0))
    where x is the corrected state of σ and x̂0' is predicted at x' before it is corrected, with the one velocity of that state:
    so the step from σ' first corrects x' and then predicts from x'ᶜ. The states of a forest are predicted ones. First order,
    without x̂0₋ (ρ₁ = 0, ρ₂ = 1/2): the first step, its corrector, and the predictor at σ' = 0, where x' = x̂0.
    In fp32 on the CPU it is, bit for bit, diffusers' scheduler with solver_order=2, solver_type="bh2", predict_x0, flow sigmas
    and flow prediction, lower_order_final, final_sigmas_type="zero".
    Not kept: replay, since the history of a step is not stored; the rounding of σ·v to bf16 where Wan runs in bf16. The network's
    integer timestep is floor(1000·σ) in float64, that of the scheduler at every level of its grids of up to 100 steps.
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
        """carry: (corrected x, x̂0) of σ, from the second step on also x̂0₋, and their levels [N, 1 or 2], newest first."""
        x, v, sigma, sigma_next = solver_inputs(self, x, v, sigma, sigma_next, ctx)
        states, past = ((), ()) if ctx.carry is None else (ctx.carry.states, ctx.carry.sigma.to(sigma).unbind(1))
        shrink, gain, half, ratio = predictor = _predictor(sigma, sigma_next, *past[:1])
        corrector = _corrector(sigma, *past) if past else ()
        slope = gain - half / ratio
        if past:
            slope = slope + shrink * corrector[1] * corrector[2]
        velocity_coef, step_size, *coefficients = send(
            x.device, sigma * slope, sigma - sigma_next, sigma, *predictor, *corrector
        )
        level, shrink, gain, half, ratio, *correcting = (spread(each, x) for each in coefficients)
        x0 = x - level * v
        if past:
            x = _corrected(x0, states, correcting)
        mean = shrink * x - gain * x0
        if past:
            mean = mean - half * ((states[1] - x0) / ratio)
        carry = Carry((x, x0, *states[1:2]), torch.stack([sigma, *past[:1]], 1))
        return solved(self, mean, velocity_coef, step_size, carry)


def _predictor(
    sigma: Tensor, sigma_next: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(σ'/σ, g, g/2, r) [N], with g/2 = 0 and r = 1 in rows of first order; before: σ₋."""
    h = log_snr(sigma_next) - log_snr(sigma)
    gain = (1 - sigma_next) * torch.expm1(-h)
    half, ratio = torch.zeros_like(gain), torch.ones_like(gain)
    if before is not None:
        second = sigma_next > 0
        half = torch.where(second, 0.5 * gain, half)
        ratio = torch.where(second, (log_snr(before) - log_snr(sigma)) / h, ratio)
    return sigma_next / sigma, gain, half, ratio


def _corrector(sigma: Tensor, before: Tensor, earlier: Tensor | None = None) -> tuple[Tensor, ...]:
    """(σ/σ₋, g, ρ₂) [N] of the step that arrived from σ₋, and (ρ₁, r) if it had a history; earlier: σ₋₋.

    ρ₁ + ρ₂ and r·ρ₁ + ρ₂ are such that x̂0 linear and quadratic in λ are integrated exactly."""
    h = log_snr(sigma) - log_snr(before)
    phi = torch.expm1(-h)
    step = sigma / before, (1 - sigma) * phi
    if earlier is None:
        return *step, torch.full_like(h, 0.5)
    ratio = (log_snr(earlier) - log_snr(before)) / h
    linear = phi / -h - 1
    quadratic = linear / -h - 0.5
    one = torch.ones_like(h)
    matrix = torch.stack([torch.stack([one, one], 1), torch.stack([ratio, one], 1)], 1)
    first, last = torch.linalg.solve(matrix, torch.stack([linear / phi, quadratic * 2 / phi], 1)).unbind(1)
    return *step, last, first, ratio


def _corrected(x0: Tensor, states: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """x'ᶜ [N, *] from x̂0' and the states of the carry."""
    x, x0_before, *earlier = states
    shrink, gain, last, *of_earlier = coefficients
    change = last * (x0 - x0_before)
    if earlier:
        first, ratio = of_earlier
        change = first * ((earlier[0] - x0_before) / ratio) + change
    return shrink * x - gain * x0_before - gain * change
