"""Ascent: start noise that follows the gradient of the rewards (ReNO), or an estimate of it from scores alone (SPSA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.noise_optimization.objective import Objective, Trial
from samplers import normal


def norm_penalty(noise: Tensor) -> Tensor:
    """½‖z‖² − (d−1)·ln‖z‖ of each row of z [n, *], in fp32 (float64 stays) [n].

    Minus the log-density, up to a constant, of the norm of d independent normal numbers (the χ law; ReNO, 2406.04312). Its
    gradient is z·(1 − (d−1)/‖z‖²): it draws the norm to √(d−1) and leaves the direction alone."""
    rows = noise.flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    norm = rows.norm(dim=1)
    return 0.5 * norm.square() - (rows.shape[1] - 1) * norm.log()


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent with Nesterov's momentum; the defaults are ReNO's (2406.04312 and its code).

    learning_rate: the clipped gradient of each noise has a norm of at most `clip`, so a step is at most
    lr·clip·(1 + momentum/(1 − momentum)) long: 5, against a noise of length √d. norm_weight: λ of `norm_penalty`."""

    learning_rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    norm_weight: float = 0.01

    def __post_init__(self) -> None:
        ok = 0 < self.learning_rate < math.inf and 0 <= self.momentum < 1 and self.clip > 0 and self.norm_weight >= 0
        if not ok:
            raise ValueError(
                f"got {self}; expected a learning rate and a clip above 0, a momentum in [0, 1) and a norm weight of at least 0"
            )


@dataclass(frozen=True)
class Gradient:
    """ReNO (2406.04312): ascends the weighted rewards minus λ·`norm_penalty`, through the sampler and the decoder.

    last_steps: only the last so many steps of the sampler carry gradient through the network (None: all), the others pass it
    on by the kernel's arithmetic. detach_uncond: no gradient through the unconditional half of a guided velocity. One
    iteration costs a forward and a backward of each step; the last one only looks, so 50 are 49 updates. Not kept: scaling
    against the underflow of fp16."""

    needs_gradient: ClassVar[bool] = True
    ascent: Ascent = Ascent()
    last_steps: int | None = None
    detach_uncond: bool = False

    def begin(self, objective: Objective, start: Tensor) -> _GradientWalk:
        steps = objective.settings.num_inference_steps
        if self.last_steps is not None and not 1 <= self.last_steps <= steps:
            raise ValueError(f"got last_steps={self.last_steps}; expected 1 to {steps}, the sampler's steps, or None")
        return _GradientWalk(self, objective, _Climb(self.ascent, start))


@dataclass(frozen=True)
class SPSA:
    """Simultaneous perturbation (Spall 1992), with normal directions (Nesterov and Spokoiny 2017), in the place of the gradient,
    for rewards that have none.

    g = mean over `directions` of (r(z + cΔ) − r(z − cΔ))/2c · Δ with keyed normal Δ and c = `scale`: the gradient of r smoothed
    by N(0, c²), in the mean. One iteration costs 1 + 2·directions samples: z itself is scored too."""

    needs_gradient: ClassVar[bool] = False
    ascent: Ascent = Ascent()
    directions: int = 4
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.directions < 1 or not 0 < self.scale < math.inf:
            raise ValueError(f"got {self}; expected at least one direction and a scale above 0")

    def begin(self, objective: Objective, start: Tensor) -> _SPSAWalk:
        return _SPSAWalk(self, objective, _Climb(self.ascent, start))


class _Climb:
    """The noises, each a parameter of its own, and torch's optimizer, which leaves those without a gradient alone."""

    def __init__(self, ascent: Ascent, start: Tensor) -> None:
        self.ascent = ascent
        self.noises = [row.clone().requires_grad_() for row in start]
        self.optimizer = torch.optim.SGD(
            self.noises, lr=ascent.learning_rate, momentum=ascent.momentum, nesterov=ascent.momentum > 0, maximize=True
        )

    def at(self, rows: Tensor) -> Tensor:
        """[n, *], with graph to the parameters."""
        return torch.stack([self.noises[row] for row in rows.tolist()])

    def move(self, rows: Tensor, gradient: Tensor) -> None:
        """One step of the noises `rows` up `gradient` [n, *] of the rewards, less that of the penalty. Rows whose gradient is
        not finite stay where they are."""
        self.optimizer.zero_grad(set_to_none=True)
        noise = self.at(rows).detach().requires_grad_()
        (penalty,) = torch.autograd.grad(norm_penalty(noise).sum(), noise)
        ascent = gradient - self.ascent.norm_weight * penalty
        for row, direction in zip(rows.tolist(), ascent, strict=True):
            if bool(direction.isfinite().all()):
                parameter = self.noises[row]
                parameter.grad = direction.to(parameter)
                torch.nn.utils.clip_grad_norm_([parameter], self.ascent.clip)
        self.optimizer.step()


@dataclass(eq=False)
class _GradientWalk:
    method: Gradient
    objective: Objective
    climb: _Climb
    pending: tuple[Tensor, Tensor, Tensor] | None = None  # rows, noise and total of the last trial, with its graph

    def step(self, rows: Tensor) -> Trial:
        if self.pending is not None:  # only now: the last iteration needs no backward
            former, noise, total = self.pending
            self.pending = None
            has_graph = total.requires_grad  # not where the reward got none of the images, since none was finite
            self.climb.move(
                former, torch.autograd.grad(total, noise)[0] if has_graph else torch.full_like(noise, torch.nan)
            )
        noise = self.climb.at(rows).detach().requires_grad_()
        steps, last = self.objective.settings.num_inference_steps, self.method.last_steps
        with torch.enable_grad():
            scored = self.objective.with_gradient(
                noise, rows, active=None if last is None else range(steps - last, steps),
                detach_uncond=self.method.detach_uncond,
            )  # fmt: skip
            self.pending = rows, noise, torch.where(scored.total.isnan(), 0.0, scored.total).sum()
        return scored.trial(noise)


@dataclass(eq=False)
class _SPSAWalk:
    method: SPSA
    objective: Objective
    climb: _Climb
    pending: tuple[Tensor, Tensor] | None = None
    iteration: int = 0

    def step(self, rows: Tensor) -> Trial:
        if self.pending is not None:
            self.climb.move(*self.pending)
        noise, count, c = self.climb.at(rows).detach(), self.method.directions, self.method.scale
        probes = self._probes(rows).to(noise)  # [n, K, *]
        center = noise[:, None]
        tried = torch.cat([center, center + c * probes, center - c * probes], 1)
        candidates = tried.flatten(0, 1)
        scored = self.objective(candidates, rows.repeat_interleave(1 + 2 * count))
        totals = scored.total.view(len(rows), -1).to(noise)
        slopes = (totals[:, 1 : 1 + count] - totals[:, 1 + count :]) / (2 * c)
        # a direction with a score that is not valid says nothing
        weights = slopes.nan_to_num(0.0) / slopes.isfinite().sum(1, keepdim=True).clamp(min=1)
        self.pending = rows, torch.einsum("nk,nk...->n...", weights, probes)
        self.iteration += 1
        return scored.trial(candidates)

    def _probes(self, rows: Tensor) -> Tensor:
        key = (self.objective.seed, "spsa", "noise", self.iteration)
        uids = [self.objective.records[row].uid for row in rows.tolist()]
        numbers = range(self.method.directions)
        return torch.stack([torch.stack([normal(self.objective.shape, *key, uid, k) for k in numbers]) for uid in uids])
