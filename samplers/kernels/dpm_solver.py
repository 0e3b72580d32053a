"""DPM-Solver++(2M) for deterministic rows (arXiv 2211.01095, algorithm 2), beside any stochastic kernel."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samplers.kernels.base import DEFAULT_CONTEXT, Affine, Carry, Kernel, Step, TransitionContext
from samplers.kernels.gaussian import Constants, Gaussian, Reduce, spread
from samplers.kernels.multistep import refuse_replay
from samplers.paths import Path, RectifiedFlow
from samplers.transfer import send


@dataclass(frozen=True)
class DPMSolver:
    """`kernel`, but deterministic rows are second order after the last stochastic step of their trajectory.

    With λ = ln(a/b) of the path, η = λ' - λ, η₋ = λ - λ₋ and r = η/(2η₋): D = (1+r)·x̂0 - r·x̂0₋ and
    x' = (b'/b)·x + (a' - a·b'/b)·D. With D = x̂0 this is the kernel's own deterministic step (Euler, DDIM), so
    x' = that step + (a' - a·b'/b)·r·(x̂0 - x̂0₋), which leaves first-order rows bit for bit as they were. One velocity
    a step, as Euler. First order: without history (a root's step), at σ' = 0 (x' = x̂0), where σ₋ = 1 (r = 0; r goes to
    0 as σ₋ goes to 1), and where a stochastic step still follows (`ctx.tail` is false) unless `prefix`.
    MixGRPO-Flash 2507.21802: DPMSolver(FlowSDE()) and a plan whose tail jumps grid indices (Compressed).

    across_noise: take x̂0₋ also over a stochastic step (MixGRPO's code); False starts a tail with one first-order step. Over
    the noise x̂0 jumps by O(√h): halving all steps divides the tail's error by 2.8 (order 1.5) with True, by 4 with False.
    prefix: second order also before a stochastic step. Off by default: faster solvers before the window collapsed
    training (2507.21802). path: the policy's; None stands for a rectified flow, `bind` fills it in.
    Not kept: deterministic steps cannot be replayed alone, since their history is not stored. Stochastic steps replay.
    """

    kernel: Kernel
    across_noise: bool = True
    path: Path | None = field(default=None, repr=False)
    prefix: bool = False

    @property
    def reduce(self) -> Reduce:
        """The kernel's."""
        return self.kernel.reduce

    @property
    def constants(self) -> Constants:
        """The kernel's."""
        return self.kernel.constants

    @property
    def uses_roots(self) -> bool:
        """The kernel's."""
        return self.kernel.uses_roots

    def bind(self, path: Path) -> Kernel:
        """The solver for a policy on `path`; ValueError if the kernel cannot be on it."""
        return replace(self, kernel=self.kernel.bind(path), path=path)

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N] of the kernel: those of a first-order step, where the row is deterministic."""
        return self.kernel.coefficients(sigma, sigma_next, level, step)

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        ctx: TransitionContext = DEFAULT_CONTEXT,
    ) -> Step:
        """The kernel's step, corrected. ValueError for the replay of a deterministic step."""
        step = self.kernel(x, v, sigma, sigma_next, ctx)
        sigma, sigma_next = (torch.as_tensor(s, dtype=torch.float64).expand(len(x)) for s in (sigma, sigma_next))
        deterministic = step.behavior.noiseless.to(sigma.device)
        if ctx.replay:
            refuse_replay(self, deterministic & (sigma_next > 0))
            return step
        path = self.path or RectifiedFlow()
        x0 = path.x0_from_velocity(x.to(step.mean), v.to(step.mean), sigma)
        known_at = sigma if self.across_noise else torch.where(deterministic, sigma, torch.nan)
        step = replace(step, carry=Carry((x0,), known_at))
        if ctx.carry is None:
            return step
        ratio, gain = _second_order(path, ctx.carry.sigma.to(sigma), sigma, sigma_next)
        corrected = deterministic & ratio.isfinite()
        if ctx.tail is not None and not self.prefix:
            corrected &= ctx.tail.to(sigma.device)
        ratio, gain = (t.to(step.mean.dtype) for t in (torch.where(corrected, ratio, 0.0), gain))
        ratio, gain = send(x0.device, ratio, gain)
        correction = spread(gain * ratio, x0) * (x0 - ctx.carry.states[0].to(x0))
        policy = _corrected(step.policy, correction, ratio)
        behavior = policy if step.behavior is step.policy else _corrected(step.behavior, correction, ratio)
        return replace(step, policy=policy, behavior=behavior)


def _second_order(path: Path, sigma_before: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(r, a' - a·b'/b) [N]; r is 0 or not finite where the step is of first order."""
    (a, b, _, _), (a_next, b_next, _, _) = path.mix(sigma), path.mix(sigma_next)
    known = sigma_before.isfinite()
    a_before, b_before, _, _ = path.mix(torch.where(known, sigma_before, sigma))
    log_snr = (a / b).log()
    ratio = ((a_next / b_next).log() - log_snr) / (2.0 * (log_snr - (a_before / b_before).log()))
    return torch.where(known, ratio, 0.0), a_next - a * b_next / b


def _corrected(gaussian: Gaussian, correction: Tensor, ratio: Tensor) -> Gaussian:
    """The mean moved where the ratio is not 0; ∂mean/∂v grows by 1 + r, since x̂0 is affine in v."""
    mean = torch.where(spread(ratio, correction) == 0, gaussian.mean, gaussian.mean + correction)
    return replace(gaussian, mean=mean, velocity_coef=gaussian.velocity_coef * (1.0 + ratio))
