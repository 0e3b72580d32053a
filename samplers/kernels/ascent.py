"""Gradients that guide a sampler: of a process reward on noisy latents, or estimated from values alone (SPSA)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.kernels.gaussian import spread
from samplers.paths import Path, RectifiedFlow


class ProcessReward(Protocol):
    """A reward of noisy latents."""

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """[n], higher is better: states x [n, *] at σ [n] under the condition rows [n]. Row by row: no row may change
        another's score."""
        ...


class Ascent(Protocol):
    """What moves a guided mean: ∇ρ at some states."""

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        """[n, *] in at least fp32, without graph. x, v [n, *], detached; σ, condition rows, nodes [n] of the states."""
        ...


@dataclass(frozen=True)
class RewardGradient:
    """∇_x ρ(x, σ, rows) by autograd: fp32 whatever the autocast, the velocity not involved.

    micro_batch: at most so many states per forward and backward of the reward; the result does not depend on it.
    ValueError for scores that are not one number per state, or a gradient that is not finite: never a silent 0.
    """

    reward: ProcessReward
    micro_batch: int | None = None

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        """One forward and backward of the reward per state; `v` and `nodes` do not matter."""
        parts = torch.arange(len(x)).split(self.micro_batch or len(x))
        gradient = torch.cat([self._part(x[part.to(x.device)], sigma[part], rows[part]) for part in parts])
        bad = ~gradient.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(
                f"got a gradient of the process reward that is not finite in rows {bad.nonzero().flatten()[:8].tolist()}; "
                "expected finite numbers: repair the reward, or end the guidance before these steps"
            )
        return gradient

    def _part(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
            scores = _checked_scores(self.reward.score(x, sigma.to(x), rows), len(x))
            (gradient,) = torch.autograd.grad(scores.sum(), x)
        return gradient


@dataclass(frozen=True)
class SPSA:
    """∇ρ from values alone: 2M scores around each state, for rewards without a gradient (Euphonium).

    noise: nodes [n] -> u [M, n, *], independent N(0, 1) and a function of the node, as KeyedNoise.probes gives them."""

    reward: ProcessReward
    noise: Callable[[Tensor], Tensor]
    tau: float = 0.01

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        """The estimate; `v` does not matter."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return spsa_gradient(
            lambda latents: self.reward.score(latents, sigma.to(x), rows), x, self.noise(nodes), self.tau
        )


@dataclass(frozen=True)
class AtPrediction:
    """`ascent` at σ = 0 around the predicted x̂0(x, v, σ), for a reward of finished samples.

    Not kept: ∂x̂0/∂x = I - σ·∂v/∂x; the gradient at x̂0 stands for that at x, as in Euphonium's code. path: the policy's;
    None stands for a rectified flow."""

    ascent: Ascent
    path: Path | None = None

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        """That of `ascent` at x̂0."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x0 = (self.path or RectifiedFlow()).x0_from_velocity(x.to(dtype), v.to(dtype), sigma)
        return self.ascent.gradient(x0, v, torch.zeros_like(sigma), rows, nodes)


@torch.no_grad()
def spsa_gradient(score: Callable[[Tensor], Tensor], x0: Tensor, noise: Tensor, tau: float = 0.01) -> Tensor:
    """(1/M) Σ_m (f(x0 + τu_m) - f(x0 - τu_m))/(2τ)·u_m, [n, *]; f = `score` [n, *] -> [n], u = noise [M, n, *].

    Simultaneous perturbation (Spall 1992). Unbiased for linear and quadratic f; of a linear f with gradient g one draw
    has variance |g|² + g_d² in element d, so it grows with the number of elements.
    """
    if noise.ndim != x0.ndim + 1 or noise.shape[1:] != x0.shape or not len(noise):
        raise ValueError(f"got noise {list(noise.shape)} for states {list(x0.shape)}; expected [M, n, *], M >= 1")
    if not tau > 0:
        raise ValueError(f"got tau={tau}; expected a number > 0, the length of a probing step")
    total = torch.zeros_like(x0)
    for u in noise.to(x0):
        plus, minus = (_checked_scores(score(x0 + sign * tau * u), len(x0)) for sign in (1.0, -1.0))
        total += spread((plus - minus).to(x0) / (2.0 * tau), x0) * u
    if not bool(total.isfinite().all()):
        raise ValueError("got a probed score that is not finite; expected finite numbers: repair the reward")
    return total / len(noise)


def _checked_scores(scores: Tensor, states: int) -> Tensor:
    if scores.shape != (states,):
        raise ValueError(
            f"got process rewards {list(scores.shape)} for {states} states; expected [{states}], one number per state"
        )
    return scores
