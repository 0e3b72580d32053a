"""A denoising transition: what a kernel is given, what it returns, and the arithmetic that all kernels share.

Coefficients are computed in float64 where the sigmas are, usually on the host, then cast to the dtype of the states (at least
fp32) and sent to their device by one copy: a step of sigmas on the host does not wait for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.kernels.gaussian import Constants, Gaussian, KLForm, Reduce, check_same_shape, spread
from samplers.paths import Path
from samplers.transfer import Rows, send


@dataclass(frozen=True, eq=False)
class Affine:
    """One step per row: x' ~ N(α·x + b·v, s²), α = alpha, b = velocity_coef < 0, s = std. Each [N], float64."""

    alpha: Tensor
    velocity_coef: Tensor
    std: Tensor


@dataclass(frozen=True, eq=False)
class Carry:
    """What a multistep solver passes on to the children of a step.

    states: tensors [N, *], such as x̂0; sigma [N] or [N, k]: the levels they belong to; nan: no history. Which they are is the
    kernel's own business; all steps of one generation pass on as many."""

    states: tuple[Tensor, ...]
    sigma: Tensor

    @staticmethod
    def joined(parts: "Sequence[tuple[Rows, Carry]]") -> "Carry | None":
        """Of parts that hold each row once; None of none."""
        if len(parts) < 2:
            return parts[0][1] if parts else None
        numbers, there = torch.cat([rows.numbers for rows, _ in parts]), torch.cat([rows.there for rows, _ in parts])
        order = Rows(numbers.argsort(), there.argsort())
        carries = [carry for _, carry in parts]
        states = tuple(torch.cat(same) for same in zip(*(carry.states for carry in carries), strict=True))
        return Carry(states, torch.cat([carry.sigma for carry in carries])).rows(order)

    def rows(self, chosen: Rows) -> "Carry":
        """The rows `chosen` [n], repeats allowed: one per child."""
        on_host = self.sigma.device.type == "cpu"
        sigma = self.sigma[chosen.numbers if on_host else chosen.there]
        return Carry(tuple(chosen.of(each) for each in self.states), sigma)


@dataclass(frozen=True, eq=False)
class Step:
    """One transition: `policy` is scored, `behavior` is drawn from; the same object unless the step is guided.

    carry: what a multistep solver passes on to the children of these rows; None from other kernels.
    """

    policy: Gaussian
    behavior: Gaussian
    carry: Carry | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of the behavior [N, *]."""
        return self.behavior.mean

    @property
    def std(self) -> Tensor:
        """Standard deviation of the behavior [N]."""
        return self.behavior.std

    def sample(self, noise: Tensor) -> Tensor:
        """A draw from the behavior."""
        return self.behavior.sample(noise)

    def log_prob(self, x_next: Tensor) -> Tensor:
        """Log density of `x_next` under the policy [N]."""
        return self.policy.log_prob(x_next)

    def log_ratio(self, other: "Step", x_next: Tensor) -> Tensor:
        """Log density ratio [N] of this policy to that of the same step under another velocity, at `x_next`."""
        return self.policy.log_ratio(other.policy, x_next)

    def kl(self, other: "Step", form: KLForm = "exact_times_h") -> Tensor:
        """Divergence of this policy from that of the same step under another velocity [N]."""
        return self.policy.kl(other.policy, form)


@dataclass(frozen=True, eq=False)
class TransitionContext:
    """What a kernel may know of the rows it steps.

    level: [N] or one factor of the kernel's own noise level; 0 = the path's deterministic step. roots [N]: which root
    each row descends from, hence its condition. nodes [N]: the child nodes; parents [N]: the nodes they leave. step [N]:
    grid index of the parent. carry [N]: what the parents' steps passed on. tail [N] bool: True where no stochastic step
    follows; None: all True. replay: the step was drawn before and only its policy is needed; carry and tail are None
    then. preview: the rows complete states to previews, which are discarded: no reward guides them.
    """

    level: Tensor | float = 1.0
    roots: Tensor | None = None
    nodes: Tensor | None = None
    parents: Tensor | None = None
    step: Tensor | None = None
    carry: Carry | None = None
    tail: Tensor | None = None
    replay: bool = False
    preview: bool = False


DEFAULT_CONTEXT = TransitionContext()


class Kernel(Protocol):
    """One denoising transition. A new kernel is a frozen dataclass with `coefficients`, the fields `reduce` and `constants`,
    `uses_roots = False`, `__call__ = affine_step` and `bind = bind_rectified_flow`; cps.py is a short example."""

    @property
    def reduce(self) -> Reduce: ...

    @property
    def constants(self) -> Constants: ...

    @property
    def uses_roots(self) -> bool:
        """Whether a step reads `ctx.roots`, as reward guidance does. These number the conditions of one process,
        so such a kernel runs on one process only."""
        ...

    def bind(self, path: Path) -> "Kernel":
        """The kernel for a policy on `path`: itself, or bound to the path's levels; ValueError if it cannot be."""
        ...

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N] in float64 for σ > σ' [N]; level 0 gives the path's deterministic step, (1, -h, 0) for a flow.

        step [N] or one: grid index that each row leaves. A kernel whose first step of a grid is special (Flow-SDE) goes
        by index 0, not by σ = 1: some grids start just below 1. None: not known, so no row is taken as the first.
        """
        ...

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        ctx: TransitionContext = DEFAULT_CONTEXT,
    ) -> Step:
        """x, v [N, *] (at least one axis after the rows); σ, σ' one number or [N]."""
        ...


def affine_step(
    kernel: Kernel,
    x: Tensor,
    v: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    ctx: TransitionContext = DEFAULT_CONTEXT,
) -> Step:
    """The step of an unguided one-step kernel: its coefficients applied to x, v [N, *], in at least fp32; σ, σ' one
    number or [N]. ValueError for other shapes."""
    x, v = states_of(x, v)
    sigma, sigma_next = per_row("sigma", sigma, len(x)), per_row("sigma_next", sigma_next, len(x))
    level = per_row("level", ctx.level, len(x))
    affine = kernel.coefficients(sigma, sigma_next, level, ctx.step)
    computed = [c.to(x.dtype) for c in (affine.alpha, affine.velocity_coef, affine.std, sigma - sigma_next)]
    alpha, velocity_coef, std, step_size = send(x.device, *computed)
    std_on_host = computed[2] if sigma.device.type == "cpu" else None
    # α is exactly 1 on deterministic rows, so this is diffusers' x + (σ' - σ)·v bit for bit there.
    mean = spread(alpha, x) * x + spread(velocity_coef, x) * v
    gaussian = Gaussian(mean, std, velocity_coef, step_size, kernel.reduce, kernel.constants, std_on_host)
    return Step(policy=gaussian, behavior=gaussian)


def states_of(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """x, v [N, *] in one dtype of at least fp32. ValueError for other shapes."""
    if x.ndim < 2:
        raise ValueError(f"got x of shape {tuple(x.shape)}; expected [N, *], rows first: add an axis to flat states")
    check_same_shape("v", v, x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, v.dtype), torch.float32)
    return x.to(dtype), v.to(dtype)


def bind_rectified_flow(kernel: Kernel, path: Path) -> Kernel:
    """`kernel` itself, written for rectified flows; ValueError for a policy on another path."""
    if not path.rectified:
        raise ValueError(
            f"got {type(kernel).__name__} for a policy on {type(path).__name__}; expected a rectified flow, which its formula "
            "is for: take DDIM for Stable Diffusion 1.5"
        )
    return kernel


def step_inputs(sigma: Tensor, sigma_next: Tensor, level: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """(σ, σ', level) in float64, checked: 1 >= σ > σ' >= 0 and level >= 0 in every row."""
    sigma, sigma_next = torch.as_tensor(sigma, dtype=torch.float64), torch.as_tensor(sigma_next, dtype=torch.float64)
    level = torch.as_tensor(level, dtype=torch.float64, device=sigma.device)
    ordered = (sigma <= 1) & (sigma > sigma_next) & (sigma_next >= 0)
    if not bool(ordered.all()):
        raise ValueError(
            f"got sigma {_some(sigma)} -> sigma_next {_some(sigma_next)}; expected 1 >= sigma > sigma_next >= 0 in "
            "every row: noise levels go down from 1 (noise) to 0 (data)"
        )
    if not bool(((level >= 0) & level.isfinite()).all()):
        raise ValueError(f"got level {_some(level)}; expected finite factors >= 0 of the kernel's own noise level")
    return sigma, sigma_next, level.expand_as(sigma)


def euler_maruyama(g: Tensor, sigma: Tensor, sigma_next: Tensor) -> Affine:
    """One Euler-Maruyama step of the reverse SDE with diffusion coefficient g; where g is 0, the Euler step.

    Flow-GRPO 2505.05470 eq. 9 in our variables: μ = x - h·v - (h g²/2σ)·ε̂, s = g√h.
    Not kept: the marginals. While g²h/σ is small their error is of first order in h; a step on point-mass data adds the
    variance (g²h²/σ)(1 + g²/4σ).
    """
    h = sigma - sigma_next
    pull = g.square() * h / (2.0 * sigma)
    return Affine(alpha=1.0 - pull, velocity_coef=-h - pull * (1.0 - sigma), std=g * h.sqrt())


def euler_where_deterministic(affine: Affine, level: Tensor, sigma: Tensor, sigma_next: Tensor) -> Affine:
    """`affine`, but the exact Euler step (1, -h, 0) in the rows whose level is 0."""
    deterministic = level == 0
    return Affine(
        alpha=torch.where(deterministic, torch.ones_like(affine.alpha), affine.alpha),
        velocity_coef=torch.where(deterministic, sigma_next - sigma, affine.velocity_coef),
        std=torch.where(deterministic, torch.zeros_like(affine.std), affine.std),
    )


def check_choices(reduce: str, constants: str) -> None:
    """ValueError unless `reduce` and `constants` are values that every kernel knows."""
    if reduce not in ("mean", "sum"):
        raise ValueError(f"got reduce={reduce!r}; expected 'mean' or 'sum'")
    if constants not in ("full", "none"):
        raise ValueError(f"got constants={constants!r}; expected 'full' or 'none'")


def check_noise_level(noise_level: float, highest: float = math.inf) -> None:
    """A noise level is a finite number in [0, highest]."""
    if not (math.isfinite(noise_level) and 0.0 <= noise_level <= highest):
        limit = "" if highest == math.inf else f", at most {highest}"
        raise ValueError(f"got noise_level={noise_level}; expected a finite number of at least 0 (the ODE){limit}")


def per_row(name: str, value: Tensor | float, n: int) -> Tensor:
    """`value`, one number or [n], as [n] float64. ValueError for another shape."""
    rows = torch.as_tensor(value, dtype=torch.float64)
    if rows.ndim > 1 or (rows.ndim == 1 and len(rows) not in (1, n)):
        raise ValueError(f"got {name} of shape {tuple(rows.shape)}; expected one number or [{n}], one per row of x")
    return rows.expand(n)


def _some(rows: Tensor) -> list[float]:
    return rows.flatten()[:8].tolist()
