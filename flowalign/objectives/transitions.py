"""Policy-gradient losses of one edge from its log-probs and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from samplers import Step
from samplers.kernels.base import spread


@dataclass(frozen=True, eq=False)
class Transitions:
    """What an objective may read of E transitions besides their log-probs.

    step: the transitions under the current policy, with gradient. arrived [E, *]: the states reached. old: the same
    transitions under the weights of the rollout, without gradient; None unless the objective needs_old_means.
    bounds [E, C, 2], beside the states: how far the ratio of each edge and channel may go below and above 1; None: the objective's own clip
    range."""

    step: Step
    arrived: Tensor
    old: Step | None = None
    bounds: Tensor | None = None


@dataclass(frozen=True)
class ClipRange:
    """The narrower side of a clip range, and the size of the latents that it is scaled from; None: it stands as it is."""

    low: float
    elements: int | None


class Objective(Protocol):
    """A loss of transitions. Where only log-probs matter, `transitions` may be left out."""

    @property
    def needs_old_means(self) -> bool:
        """Whether `transitions.old` must be there."""
        ...

    @property
    def clip(self) -> ClipRange | None:
        """Its clip range, whose place `transitions.bounds` may take; None: it has none."""
        ...

    def drift_limit(self, transitions: Transitions) -> Tensor:
        """[E] how far abs(log_ratio) may be from 0 with unchanged weights before the update would act on rounding."""
        ...

    def log_ratio(self, log_prob: Tensor, old_log_prob: Tensor, transitions: Transitions | None = None) -> Tensor:
        """The logarithm [E] of the ratio that the objective clips or masks."""
        ...

    def loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        """`log_prob`, `old_log_prob` [E]; `advantages` [E, C]. Returns the loss [E], summed over channels."""
        ...

    def clipped(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        """[E] which transitions are outside the trust region: a metric."""
        ...


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped surrogate, one term per advantage channel: max(−A·r, −A·clip(r, 1−lo, 1+hi)) (1707.06347).

    r = exp(log_prob − old_log_prob) [E], A the advantages [E, C]. clip_range: one number or (lo, hi), > 0, of the ratio of
    the kernel's own log-probs: 1e-4 is the Flow-GRPO value (2505.05470) for mean-reduced log-probs of 65,536 elements.
    elements: the size of the latents that clip_range was found for; others get clip_range scaled by
    `scale_of_clip_range`. None: clip_range as it stands. A term's coefficient is a factor on its channel
    (Mixed.weights). `transitions.bounds` take the place of clip_range."""

    clip_range: float | tuple[float, float] = 1e-4
    elements: int | None = None

    def __post_init__(self) -> None:
        _check_clip(self.clip_range, self.elements)

    @property
    def clip(self) -> ClipRange:
        return ClipRange(min(_pair(self.clip_range)), self.elements)

    @property
    def needs_old_means(self) -> bool:
        return False

    def drift_limit(self, transitions: Transitions) -> Tensor:
        return _bounds(self, transitions).min().expand(len(transitions.arrived))

    def log_ratio(self, log_prob: Tensor, old_log_prob: Tensor, transitions: Transitions | None = None) -> Tensor:
        return log_prob - old_log_prob

    def loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        return _surrogate(self.log_ratio(log_prob, old_log_prob), advantages, _bounds(self, transitions))

    def clipped(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        return _outside(self.log_ratio(log_prob, old_log_prob), _bounds(self, transitions))


@dataclass(frozen=True)
class Guard:
    """GRPO-Guard (2510.22319): the clipped surrogate of a ratio without bias, ln r̂ = s·[ln r + ⟨Δμ²⟩/(2s²)] = ⟨z·Δμ⟩.

    z = (x' − μ_old)/s, Δμ = μ − μ_old, ⟨⟩ reduced like the kernel's log-prob; computed from the means, where fp32 keeps
    what a difference of log-probs would lose. The ratio has the same spread at every step, so one small clip range serves
    all: 2e-6 (GenEval, OCR), 4e-6 (PickScore) for 65,536 elements; elements: as in ClippedRatio.
    weight of a step: "inv_h" 1/h (flat gradients with Flow-SDE), "beta_over_h" |b|/h² (Eq. 12 for Dance-SDE, as others
    read it; the gradient scale is then (|b|/h)²), "inv_b" 1/|b| (flat for every kernel), "none".
    Needs the old means: those of the velocities that the rollout kept."""

    clip_range: float | tuple[float, float] = 2e-6
    weight: Literal["none", "inv_h", "beta_over_h", "inv_b"] = "inv_h"
    elements: int | None = None

    def __post_init__(self) -> None:
        _check_clip(self.clip_range, self.elements)
        if self.weight not in ("none", "inv_h", "beta_over_h", "inv_b"):
            raise ValueError(f"got weight={self.weight!r}; expected 'none', 'inv_h', 'beta_over_h' or 'inv_b'")

    @property
    def clip(self) -> ClipRange:
        return ClipRange(min(_pair(self.clip_range)), self.elements)

    @property
    def needs_old_means(self) -> bool:
        return True

    def drift_limit(self, transitions: Transitions) -> Tensor:
        return _bounds(self, transitions).min().expand(len(transitions.arrived))

    def log_ratio(self, log_prob: Tensor, old_log_prob: Tensor, transitions: Transitions | None = None) -> Tensor:
        here, old = _with_old(transitions)
        z = (here.arrived.to(old.policy.mean) - old.policy.mean) / spread(old.policy.std, old.policy.mean)
        return _reduce(here.step, z * (here.step.policy.mean - old.policy.mean))

    def loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        here, _ = _with_old(transitions)
        log_ratio = self.log_ratio(log_prob, old_log_prob, here)
        return self._weigh(here.step) * _surrogate(log_ratio, advantages, _bounds(self, here))

    def clipped(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        return _outside(self.log_ratio(log_prob, old_log_prob, transitions), _bounds(self, transitions))

    def _weigh(self, step: Step) -> Tensor:
        coef, step_size = step.policy.velocity_coef.abs(), step.policy.step_size
        if self.weight == "none":
            return torch.ones_like(step_size)
        return {"inv_h": 1 / step_size, "beta_over_h": coef / step_size**2, "inv_b": 1 / coef}[self.weight]


@dataclass(frozen=True)
class KLMask:
    """Flow-DPPO's trust region (2606.11025): −A·r unclipped, but 0 where the step has already moved by `max_kl` or more from
    the rollout's weights and the loss would move it further (A > 0 and r > 1, or A < 0 and r < 1).

    KL is exact, ⟨Δμ²⟩/(2s²), reduced like the log-prob: 1e-5 is for means over elements. Needs the old means."""

    max_kl: float = 1e-5
    clip = None

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise ValueError(f"got max_kl={self.max_kl}; expected a number above 0")

    @property
    def needs_old_means(self) -> bool:
        return True

    def drift_limit(self, transitions: Transitions) -> Tensor:
        """The log ratio that a step of KL = max_kl hardly exceeds.

        Rounding moves means at random, so ln r is normal with mean −KL and std √(2·KL/D) over D elements (D = 1 where
        log-probs are sums): the limit is max_kl + 5·√(2·max_kl/D), which one step of KL = max_kl in two million exceeds.
        Without constants a log-prob, hence its limit, is 2·std² times that."""
        step = transitions.step.policy
        elements = step.mean[0].numel() if step.reduce == "mean" and len(step.mean) else 1
        limit = self.max_kl + 5 * (2 * self.max_kl / elements) ** 0.5
        return limit * (torch.ones_like(step.std) if step.constants == "full" else 2 * step.std.square())

    def log_ratio(self, log_prob: Tensor, old_log_prob: Tensor, transitions: Transitions | None = None) -> Tensor:
        return log_prob - old_log_prob

    def loss(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        ratio = self.log_ratio(log_prob, old_log_prob).exp()[:, None]
        return torch.where(self._masked(ratio, advantages, transitions), 0.0, -advantages * ratio).sum(1)

    def clipped(
        self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, transitions: Transitions | None = None
    ) -> Tensor:
        ratio = self.log_ratio(log_prob, old_log_prob).exp()[:, None]
        return self._masked(ratio, advantages, transitions).any(1)

    def _masked(self, ratio: Tensor, advantages: Tensor, transitions: Transitions | None) -> Tensor:
        here, old = _with_old(transitions)
        far = here.step.kl(old, form="exact").detach() >= self.max_kl
        away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        return far[:, None] & away


def _surrogate(log_ratio: Tensor, advantages: Tensor, bounds: Tensor) -> Tensor:
    """max(−A r, −A clip(r, 1−lo, 1+hi)) [E], summed over channels; bounds [E, C, 2] or [2].

    That is −A·min(r, 1+hi) for A > 0 and −A·max(r, 1−lo) for A < 0. The logarithms are compared: near 1, fp32 keeps the
    ratio to 1e-7 only, a twentieth of Guard's clip range."""
    per_channel = log_ratio[:, None].expand_as(advantages)
    below, above = (-bounds[..., 0].clamp(max=1)).log1p(), bounds[..., 1].log1p()
    below, above = below.to(per_channel.dtype), above.to(per_channel.dtype)
    clipped = torch.where(advantages > 0, torch.minimum(per_channel, above), torch.maximum(per_channel, below))
    return (-advantages * clipped.exp()).sum(1)


def _outside(log_ratio: Tensor, bounds: Tensor) -> Tensor:
    ratio = log_ratio.double().exp()[:, None]
    return ((ratio < 1 - bounds[..., 0]) | (ratio > 1 + bounds[..., 1])).any(1)


def scale_of_clip_range(elements: int | None, states: Tensor, reduce: str) -> float:
    """The factor of a clip range that was found for latents of `elements`, for `states` [n, *] of D elements; None: 1.

    Of the same relative change of every velocity, a log ratio that is averaged over D elements spreads as 1/√D, a summed
    one as √D: √(elements/D) and √(D/elements)."""
    if elements is None:
        return 1.0
    relative = elements / states.shape[1:].numel()
    return (relative if reduce == "mean" else 1 / relative) ** 0.5


def _bounds(objective: ClippedRatio | Guard, transitions: Transitions | None) -> Tensor:
    """[E, C, 2] beside the log-probs, or [2], of the host but usable anywhere; float64."""
    if transitions is not None and transitions.bounds is not None:
        return transitions.bounds
    limits = torch.tensor(_pair(objective.clip_range), dtype=torch.float64)
    if transitions is not None:
        return limits * scale_of_clip_range(objective.elements, transitions.arrived, transitions.step.policy.reduce)
    if objective.elements is not None:
        raise ValueError(
            f"got {objective} without transitions, which give the size of the latents: pass Transitions(step, arrived)"
        )
    return limits


def _pair(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    return clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)


def _check_clip(clip_range: float | tuple[float, float], elements: int | None) -> None:
    if min(_pair(clip_range)) <= 0:
        raise ValueError(f"got clip_range={clip_range}; expected numbers above 0 (a large one switches clipping off)")
    check_elements(elements)


def check_elements(elements: int | None) -> None:
    """ValueError for a size of latents below 1."""
    if elements is not None and elements < 1:
        raise ValueError(f"got elements={elements}; expected at least 1, or None for a clip range that is not scaled")


def _with_old(transitions: Transitions | None) -> tuple[Transitions, Step]:
    if transitions is None or transitions.old is None:
        raise ValueError(
            "got transitions without the step under the rollout's weights, which this objective needs: pass "
            "Transitions(step, arrived, old)"
        )
    return transitions, transitions.old


def _reduce(step: Step, values: Tensor) -> Tensor:
    flat = values.flatten(1)
    return flat.mean(1) if step.policy.reduce == "mean" else flat.sum(1)
