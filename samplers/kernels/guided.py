"""Reward-guided transitions: drawn from a shifted mean, scored under the kernel's own (Euphonium, arXiv 2602.04928)."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.kernels.ascent import Ascent
from samplers.kernels.base import (
    DEFAULT_CONTEXT,
    Affine,
    Constants,
    Kernel,
    Reduce,
    Step,
    TransitionContext,
    spread,
)
from samplers.paths import Path, RectifiedFlow

GuidanceForm = Literal["score_half", "full_tilt", "doob"]
MeanOf = Literal["unguided", "guided"]


@dataclass(frozen=True)
class Guided:
    """`kernel` with its behavior moved by λ·∇ρ: x' = μ + λ·∇ρ + s·z; the policy keeps μ, so ratios start at 1.

    λ = rate·h with use_delta (the released script), else the rate. rate: `scale` if given (0.01 there), else by `form`
    with temperature `beta`, g² = s²/h: "score_half" g²/(2β), the explicit score term of the SDE (what the code does
    with scale < 0); "doob" g²/β, the optimal-control drift; "full_tilt" tilts the marginals by e^{ρ/β}: v moves by
    -(b/a)·∇ρ/β (σ/(1-σ) in a flow), the score with it, so the mean by that times ∂μ/∂v; infinite at σ = 1. Only
    full_tilt reaches the tilted law at any noise level; doob does where g² = 2σ/(1-σ) (Flow-SDE with a = √2).
    normalize: ∇ρ/|∇ρ|, each row by its own norm. Active on the grid steps start..end, every `interval`; also on
    deterministic rows, which only `scale` and full_tilt move: `end` keeps a tail unguided.

    log_prob_mean "unguided": what was drawn from the guided mean is scored under μ: off-policy without importance
    weights, by design: the gradient gains λ·∇ρ/s, and so learns the guidance. "guided": both are the moved Gaussian,
    and a replay computes ∇ρ again. ∂mean/∂v stays the kernel's: ∇ρ is a constant to it.
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
    uses_rows = True

    def __post_init__(self) -> None:
        if self.form not in ("score_half", "full_tilt", "doob"):
            raise ValueError(f"form={self.form!r} came; expected 'score_half', 'full_tilt' or 'doob'")
        if self.log_prob_mean not in ("unguided", "guided"):
            raise ValueError(f"log_prob_mean={self.log_prob_mean!r} came; expected 'unguided' or 'guided'")
        if self.scale is not None and not self.scale >= 0:
            raise ValueError(
                f"scale={self.scale} came; expected a number >= 0, or None for the rate of `form` and `beta`"
            )
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} came; expected a temperature > 0")
        if self.start < 0 or self.interval < 1 or (self.end is not None and self.end < self.start):
            raise ValueError(
                f"start={self.start}, end={self.end}, interval={self.interval} came; expected 0 <= start <= end (None: "
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

    def coefficients(self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0) -> Affine:
        """α, b, s [N] of the kernel, without the shift."""
        return self.kernel.coefficients(sigma, sigma_next, level)

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        ctx: TransitionContext = DEFAULT_CONTEXT,
    ) -> Step:
        """The kernel's step with a moved behavior. A replay under the unguided mean asks for no gradient."""
        step = self.kernel(x, v, sigma, sigma_next, ctx)
        if ctx.replay and self.log_prob_mean == "unguided":
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
        rate = torch.where(self._active(ctx, len(x)).to(step.std.device), self._rate(step, sigma), 0.0)
        if not bool(rate.isfinite().all()):
            raise ValueError(
                f"the guidance {self.form!r} has no finite rate at sigma {sigma[~rate.isfinite().cpu()][:8].tolist()}; "
                "expected active steps below sigma = 1: set start=1"
            )
        hot = (rate != 0).nonzero().flatten()
        if not len(hot):
            return None
        found = self._gradient(x[hot], v[hot], sigma[hot.to(sigma.device)], ctx, hot.cpu()).to(step.mean)
        if self.normalize:
            norm = spread(found.flatten(1).norm(dim=1), found)
            found = torch.where(norm == 0, found, found / norm)
        shift = torch.zeros_like(step.mean)
        shift[hot] = spread(rate[hot], found) * found
        return shift

    def _rate(self, step: Step, sigma: Tensor) -> Tensor:
        """λ [N], before `interval` and its like; not finite where it has no value."""
        h = step.behavior.step_size
        if self.scale is not None:
            return self.scale * (h if self.use_delta else torch.ones_like(h))
        if self.form == "full_tilt":
            a, b, _, _ = (self.path or RectifiedFlow()).mix(sigma)
            moved = -step.policy.velocity_coef * (b / a).to(h) / self.beta
        else:
            moved = step.std.square() / (self.beta if self.form == "doob" else 2.0 * self.beta)
        return moved if self.use_delta else moved / h

    def _active(self, ctx: TransitionContext, n: int) -> Tensor:
        if self.start == 0 and self.end is None and self.interval == 1:
            return torch.ones(n, dtype=torch.bool)
        if ctx.step is None:
            raise ValueError(
                "Guided with start, end or interval was called without ctx.step; expected grid indices [N]"
            )
        active = (ctx.step >= self.start) & ((ctx.step - self.start) % self.interval == 0)
        return active if self.end is None else active & (ctx.step <= self.end)

    def _gradient(self, x: Tensor, v: Tensor, sigma: Tensor, ctx: TransitionContext, hot: Tensor) -> Tensor:
        """∇ρ at the states of the rows `hot`: asked once per distinct state, since siblings leave the same one."""
        own = torch.arange(len(hot))
        nodes = hot if ctx.parents is None else ctx.parents.cpu()[hot]
        rows = hot if ctx.rows is None else ctx.rows.cpu()[hot]
        distinct, position = nodes.unique(return_inverse=True)
        first = torch.full((len(distinct),), len(hot)).scatter_reduce(0, position, own, "amin")
        at = first.to(x.device)
        found = self.ascent.gradient(
            x[at].detach(), v[at].detach(), sigma[first.to(sigma.device)], rows[first], distinct
        )
        if found.shape != x[at].shape:
            raise ValueError(
                f"a gradient {list(found.shape)} came for states {list(x[at].shape)}; expected equal shapes"
            )
        return found[position.to(found.device)]
