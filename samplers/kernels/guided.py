"""Reward-guided transitions: drawn from a shifted mean, scored under the kernel's own (Euphonium, arXiv 2602.04928)."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.kernels.ascent import Ascent
from samplers.kernels.base import DEFAULT_CONTEXT, Affine, Kernel, Step, TransitionContext
from samplers.kernels.gaussian import Constants, Reduce, spread
from samplers.paths import Path, RectifiedFlow

GuidanceForm = Literal["score_half", "full_tilt", "doob"]
MeanOf = Literal["unguided", "guided"]

# what a guided rollout keeps in its Forest, for replays and distillation
GRADIENTS = "reward_gradient"  # velocities: ∇ρ at the guided states that stochastic steps leave
RATE = "guidance/rate"  # scores: what ∇ρ there is multiplied by to move the velocity, λ/b

_LEAST_DATA = 1e-3  # the least a(σ) at which full_tilt acts; grids start at σ = 1 or just below, such as 0.99999


@dataclass(frozen=True)
class Guided:
    """`kernel` with its behavior moved by λ·∇ρ: x' = μ + λ·∇ρ + s·z; the policy keeps μ, so ratios start at 1.

    λ = rate·h with use_delta (the released script), else the rate. rate: `scale` if given (0.01 there), else by `form`
    with temperature `beta`, g² = s²/h: "score_half" g²/(2β), the explicit score term of the SDE (what the code does
    with scale < 0); "doob" g²/β, the optimal-control drift; "full_tilt" tilts the marginals by e^{ρ/β}: v moves by
    -(b/a)·∇ρ/β (σ/(1-σ) in a flow), the score with it, so the mean by that times ∂μ/∂v; unbounded near σ = 1. Only
    full_tilt reaches the tilted law at any noise level; doob does where g² = 2σ/(1-σ) (Flow-SDE with a = √2).
    normalize: ∇ρ/|∇ρ|, each row by its own norm. Active on the grid steps start..end, every `interval`; also on
    deterministic rows, which only `scale` and full_tilt move: `end` keeps a tail unguided. Previews of a selection are
    never guided.

    log_prob_mean "unguided": what was drawn from the guided mean is scored under μ: off-policy without importance
    weights, by design: the gradient gains A·λ·∇ρ/s. Advantages of a set have mean 0, so of the guidance it learns what
    differs between samples and goes with the reward; a shift that all share cancels. "guided": both are the moved
    Gaussian, and a replay computes ∇ρ again. ∂mean/∂v stays the kernel's: ∇ρ is a constant to it.
    path: the policy's; None stands for a rectified flow, `bind` fills it in.
    """

    kernel: Kernel
    ascent: Ascent
    scale: float | None = None
    form: GuidanceForm = "score_half"
    beta: float = 3.125
    use_delta: bool = True
    normalize: bool = False
    start: int = 0
    end: int | None = None
    interval: int = 1
    log_prob_mean: MeanOf = "unguided"
    path: Path | None = field(default=None, repr=False)
    uses_roots = True

    def __post_init__(self) -> None:
        if self.form not in ("score_half", "full_tilt", "doob"):
            raise ValueError(f"got form={self.form!r}; expected 'score_half', 'full_tilt' or 'doob'")
        if self.log_prob_mean not in ("unguided", "guided"):
            raise ValueError(f"got log_prob_mean={self.log_prob_mean!r}; expected 'unguided' or 'guided'")
        if self.scale is not None and not self.scale >= 0:
            raise ValueError(
                f"got scale={self.scale}; expected a number >= 0, or None for the rate of `form` and `beta`"
            )
        if not self.beta > 0:
            raise ValueError(f"got beta={self.beta}; expected a temperature > 0")
        if self.start < 0 or self.interval < 1 or (self.end is not None and self.end < self.start):
            raise ValueError(
                f"got start={self.start}, end={self.end}, interval={self.interval}; expected 0 <= start <= end (None: "
                "to the last step) and interval >= 1"
            )

    @property
    def reduce(self) -> Reduce:
        """The kernel's."""
        return self.kernel.reduce

    @property
    def constants(self) -> Constants:
        """The kernel's."""
        return self.kernel.constants

    def bind(self, path: Path) -> Kernel:
        """The guided kernel for a policy on `path`; ValueError if the kernel cannot be on it."""
        return replace(self, kernel=self.kernel.bind(path), path=path)

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N] of the kernel, without the shift."""
        return self.kernel.coefficients(sigma, sigma_next, level, step)

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        ctx: TransitionContext = DEFAULT_CONTEXT,
    ) -> Step:
        """The kernel's step with a moved behavior. A replay under the unguided mean and a preview ask for no gradient."""
        step = self.kernel(x, v, sigma, sigma_next, ctx)
        if ctx.preview or (ctx.replay and self.log_prob_mean == "unguided"):
            return step
        shift = self.shift(step, x, v, sigma, ctx)
        if shift is None:
            return step
        behavior = replace(step.behavior, mean=step.behavior.mean + shift)
        return replace(step, behavior=behavior, policy=step.policy if self.log_prob_mean == "unguided" else behavior)

    @torch.no_grad()
    def shift(self, step: Step, x: Tensor, v: Tensor, sigma: Tensor | float, ctx: TransitionContext) -> Tensor | None:
        """λ·∇ρ [N, *] of the unguided `step` that leaves x [N, *]; 0 in inactive rows, None if all are.

        A velocity target that learns the guidance is v + shift/b: under it the kernel's own mean is the guided one.
        """
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        rate = self.rate(step, sigma, ctx)
        guided = (rate != 0).nonzero().flatten()
        if not len(guided):
            return None
        gradient = self._gradient(x[guided], v[guided], sigma[guided.to(sigma.device)], ctx, guided.cpu()).to(step.mean)
        if self.normalize:
            norm = spread(gradient.flatten(1).norm(dim=1), gradient)
            gradient = torch.where(norm == 0, gradient, gradient / norm)
        shift = torch.zeros_like(step.mean)
        shift[guided] = spread(rate[guided], gradient) * gradient
        return shift

    def rate(self, step: Step, sigma: Tensor, ctx: TransitionContext) -> Tensor:
        """λ [N] of the unguided `step` that leaves σ [N]; 0 in inactive rows. ValueError where it has no bound."""
        rate = torch.where(self._active(ctx, len(sigma)).to(step.std.device), self._rate(step, sigma), 0.0)
        if not bool(rate.isfinite().all()):
            unbounded = (~rate.isfinite()).to(sigma.device)
            raise ValueError(
                f"got form={self.form!r} at sigma {sigma[unbounded][:8].tolist()}, where its rate has no bound; expected "
                f"active steps with a data coefficient of at least {_LEAST_DATA}: set start=1"
            )
        return rate

    def _rate(self, step: Step, sigma: Tensor) -> Tensor:
        """λ [N], before `interval` and its like; not finite where it has no value."""
        h = step.behavior.step_size
        if self.scale is not None:
            return self.scale * (h if self.use_delta else torch.ones_like(h))
        if self.form == "full_tilt":
            a, b, _, _ = (self.path or RectifiedFlow()).mix(sigma)
            odds = torch.where(a < _LEAST_DATA, torch.inf, b / a)
            rate = -step.policy.velocity_coef * odds.to(h) / self.beta
        else:
            rate = step.std.square() / (self.beta if self.form == "doob" else 2.0 * self.beta)
        return rate if self.use_delta else rate / h

    def _active(self, ctx: TransitionContext, n: int) -> Tensor:
        if self.start == 0 and self.end is None and self.interval == 1:
            return torch.ones(n, dtype=torch.bool)
        if ctx.step is None:
            raise ValueError(
                f"got start={self.start}, end={self.end}, interval={self.interval} but no ctx.step; expected grid indices "
                "[N]: pass TransitionContext(step=...)"
            )
        active = (ctx.step >= self.start) & ((ctx.step - self.start) % self.interval == 0)
        return active if self.end is None else active & (ctx.step <= self.end)

    def _gradient(self, x: Tensor, v: Tensor, sigma: Tensor, ctx: TransitionContext, guided: Tensor) -> Tensor:
        """∇ρ at the states of the rows `guided`: computed once per distinct state, since siblings leave the same one."""
        nodes = guided if ctx.parents is None else ctx.parents.cpu()[guided]
        rows = guided if ctx.roots is None else ctx.roots.cpu()[guided]
        distinct, position = nodes.unique(return_inverse=True)
        first = torch.full((len(distinct),), len(nodes)).scatter_reduce(0, position, torch.arange(len(nodes)), "amin")
        states, velocities = x[first.to(x.device)].detach(), v[first.to(v.device)].detach()
        gradient = self.ascent.gradient(states, velocities, sigma[first.to(sigma.device)], rows[first], distinct)
        if gradient.shape != states.shape:
            raise ValueError(
                f"got a gradient {list(gradient.shape)} for states {list(states.shape)}; expected equal shapes"
            )
        return gradient[position.to(gradient.device)]
