"""Objectives of states: regressions of velocities at noised samples, which need no log-prob of a trajectory.

A draw noises a clean sample, x = a·x0 + b·ε at a level σ, and has the target u of its path (ε − x0 for rectified flow). For
every objective here the gradient is that of

    mean over draws of  c·⟨(v − u)²⟩ + Σ_a κ_a·⟨(v − v_a)²⟩

with numbers c and κ_a that carry no gradient, and roles a (old, reference, …) whose velocities are known. So an objective
only says what (c, κ) are. K = c + Σκ_a is the curvature of a draw: where its mean at a state is not above 0, the regression
has no minimum there. A weight w of the error is part of c and κ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from flowalign.objectives.matching import mean_square

Weight = Literal["velocity", "sigma", "x0", "adaptive", "adaptive_velocity", "elbo"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Velocities at n draws, without graph. live [n, *]: of the policy as it is now; roles: of others, by name; target [n, *]:
    u. noise [n]: b, the coefficient of ε at these levels (σ for rectified flow): a velocity off by δ puts x̂0 off by b·δ."""

    live: Tensor
    roles: Mapping[str, Tensor]
    target: Tensor
    noise: Tensor

    def of(self, role: str) -> Tensor:
        """The velocities of a role; of "policy" the live ones."""
        return self.live if role == "policy" else self.roles[role].to(self.live)

    def error(self, velocity: Tensor) -> Tensor:
        """[n] float64 ⟨(v − u)²⟩, the mean over elements."""
        return mean_square(velocity.double(), self.target)

    def weight(self, kind: Weight, velocity: Tensor) -> Tensor:
        """[n] float64 w of the error of `velocity`. "velocity": 1; "sigma": b; "x0": b², the error of x̂0; "adaptive": that over
        ⟨|x̂0 − x0|⟩, at least 1e-5 (DiffusionNFT 2509.16117); "adaptive_velocity": 1/⟨|v − u|⟩, so bounded (CRD 2603.14128), 1/b of
        "adaptive"; "elbo": (1 − b)/(b + 1e-3), of ELBO-PG 2602.04663's exact form, exact for a rectified flow."""
        b = self.noise.double()
        if kind in ("adaptive", "adaptive_velocity"):
            gap = (velocity.double() - self.target.double()).abs().flatten(1).mean(1)
            return b.square() / (b * gap).clamp(min=1e-5) if kind == "adaptive" else 1 / gap.clamp(min=1e-5)
        return {"velocity": torch.ones_like(b), "sigma": b, "x0": b.square(), "elbo": (1 - b) / (b + 1e-3)}[kind]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """c [n] and κ [n] by role, of n draws."""

    c: Tensor
    kappa: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DrawIds:
    """What D draws belong to: advantage [D] of their sample, its group [D], and which draw of its sample each is, number [D].
    Members of a group are compared at draws of one number."""

    advantage: Tensor
    group: Tensor
    number: Tensor

    @cached_property
    def cell(self) -> Tensor:
        """[D] the number of the (group, number) that each draw is in."""
        return torch.unique(torch.stack([self.group, self.number], 1), dim=0, return_inverse=True)[1]

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of each cell, the sum of its values [D] float64, and how many draws it has."""
        size = self.cell.bincount()
        return values.new_zeros(len(size)).index_add(0, self.cell, values), size


class StateObjective(Protocol):
    """Says (c, κ) of each draw."""

    @property
    def needs(self) -> Sequence[str]:
        """The roles whose velocities it reads, beside the live policy's."""
        ...

    @property
    def sampled_by(self) -> str | None:
        """The role that must have made the samples for the formula to hold; None: any."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether the coefficients of a draw depend on the errors of other members of its group."""
        ...

    def value(self, found: Predictions) -> Tensor:
        """[n] the number of each draw through which its group is coupled; asked only if it is."""
        ...

    def couple(self, values: Tensor, draws: DrawIds) -> Tensor:
        """[D] what `coefficients` gets of all values [D] of an update."""
        ...

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        """Of n draws; advantage [n], coupling [n] (1 where nothing is coupled)."""
        ...

    def curvature(self, advantage: Tensor) -> Tensor:
        """[n] K at unchanged weights, with w = 1 and without anchors: below 0 a draw pushes away without bound."""
        ...


def no_value(objective: StateObjective, found: Predictions) -> Tensor:
    """The `value` of an objective that couples nothing."""
    return torch.zeros(len(found.live))


def no_coupling(objective: StateObjective, values: Tensor, draws: DrawIds) -> Tensor:
    """The `couple` of an objective that couples nothing."""
    return torch.ones(len(draws.group))


@dataclass(frozen=True)
class AdvantageWeighted:
    """c = scale·w·A times a ratio: flow matching weighted by advantages, or by the shares of selected samples.

    residual "live": c·⟨(v − u)²⟩. With an anchor κ to the reference it stops at the velocity of the *linear* tilt
    p(1 + A/κ), not of exp(A/κ): AWM 2509.25050, V-GRPO 2604.23380, ELBO-PG 2602.04663, RVM 2608.23664 and the paper's form of
    RAM 2605.10759 are this with other weights, anchors, laws of σ; ill-posed where E[A|x] ≤ −κ. With weights W ≥ 0 in place of
    A (RAFT 2304.06767, supervised fine-tuning) it stops at the velocity of p·W/E[W].
    residual "old": the error of `old` takes the live one's place, c·(v_old − u): κ_old = −c, so that K is that of the anchors
    alone and convex. Code-form RAM (anchor: reference), explicit tilt matching 2512.21829 (anchor: old, A = h·r) and NFT
    without its adaptive weight.

    ratio: with Δ = w·⟨(v_old − u)²⟩ − w·⟨(v − u)²⟩, the gain in the evidence bound since the rollout, c is multiplied by
    e^Δ ("epg") or by e^Δ and A replaced by A − Δ ("pepg", whose gradient is that of ½ρ(A − Δ)²); each with the weight of its own velocity
    where that is adaptive. clip: where the ratio has moved beyond 1 ± clip in A's direction, c is 0 (PPO; AWM). Samples must
    be those of `old` where a ratio or the old residual is used; "policy" is the live policy, without a role: right at the first
    update of a rollout, where both are the same."""

    scale: float = 1.0
    weight: Weight = "velocity"
    residual: Literal["live", "old"] = "live"
    ratio: Literal["none", "epg", "pepg"] = "none"
    clip: float | None = None
    old: str = "policy"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not self.scale > 0:
            raise ValueError(f"got scale={self.scale}; expected a number above 0")
        if self.residual not in ("live", "old") or self.ratio not in ("none", "epg", "pepg"):
            raise ValueError(
                f"got residual={self.residual!r}, ratio={self.ratio!r}; expected live or old, and none, epg or pepg"
            )
        if self.clip is not None and (self.ratio == "none" or not self.clip > 0):
            raise ValueError(
                f"got clip={self.clip} with ratio={self.ratio}; expected a number above 0, of a ratio: set ratio=epg or clip=null"
            )
        if self.old != "policy" and not self._uses_old:
            raise ValueError(
                f"got old={self.old!r} with residual=live and ratio=none, which would not read it: leave it out"
            )

    @property
    def _uses_old(self) -> bool:
        return self.residual == "old" or self.ratio != "none"

    @property
    def needs(self) -> Sequence[str]:
        return [self.old] if self.old != "policy" else []

    @property
    def sampled_by(self) -> str | None:
        return self.old if self._uses_old else None

    coupled, value, couple = False, no_value, no_coupling

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        weight, signal = found.weight(self.weight, found.live), advantage.double().to(found.live.device)
        if self.ratio != "none":
            old = found.of(self.old)
            gain = found.weight(self.weight, old) * found.error(old) - weight * found.error(found.live)
            ratio = gain.exp()
            outside = _outside(ratio, signal, self.clip)
            signal = torch.where(outside, 0.0, ratio * (signal - gain if self.ratio == "pepg" else signal))
        c = self.scale * weight * signal
        return Coefficients(c, {self.old: -c} if self.residual == "old" else {})

    def curvature(self, advantage: Tensor) -> Tensor:
        return torch.zeros_like(advantage) if self.residual == "old" else self.scale * advantage


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT (2509.16117): the good share p of each sample pulls one mixture of v and v_old, the bad share the other.

    p = clip(A/(2·advantage_clip) + ½, 0, 1); v± = (1 ∓ β)·v_old ± β·v; the loss of the release,
    advantage_clip·(p·⟨(x̂0⁺ − x0)²⟩/w⁺ + (1 − p)·⟨(x̂0⁻ − x0)²⟩/w⁻)/β with w± = ⟨|x̂0± − x0|⟩, at least 1e-5, or 1 where
    adaptive is off. In the common form, with q⁺ = p/w⁺ and q⁻ = (1 − p)/w⁻ times b²·advantage_clip/β: c = β·(q⁺ − q⁻),
    κ_old = β·((1 + β)·q⁻ − (1 − β)·q⁺), K = β²·(q⁺ + q⁻) > 0: always convex.
    Where it stops (adaptive off, samples of `old`): v_old + E[(2p − 1)(u − v_old)|x]/β, one step of explicit tilt matching, which
    over-tilts; the adaptive weight moves that point, only its first direction is exact. Round after round the tilt grows:
    the length of the training is its temperature, unless an anchor holds it."""

    beta: float = 1.0
    adaptive: bool = True
    advantage_clip: float = 5.0
    old: str = "old"
    coupled, value, couple = False, no_value, no_coupling

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.advantage_clip > 0):
            raise ValueError(f"got beta={self.beta}, advantage_clip={self.advantage_clip}; expected both above 0")

    @property
    def needs(self) -> Sequence[str]:
        return [self.old] if self.old != "policy" else []

    @property
    def sampled_by(self) -> str | None:
        return self.old

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        old, beta = found.of(self.old), self.beta
        share = good_share(advantage, self.advantage_clip).to(found.live.device)
        kind: Weight = "adaptive" if self.adaptive else "x0"
        plus, minus = (found.weight(kind, old + sign * beta * (found.live - old)) for sign in (1, -1))
        good, bad = (self.advantage_clip / beta * q for q in (share * plus, (1 - share) * minus))
        return Coefficients(beta * (good - bad), {self.old: beta * ((1 + beta) * bad - (1 - beta) * good)})

    def curvature(self, advantage: Tensor) -> Tensor:
        return torch.full_like(advantage, self.beta * self.advantage_clip)


@dataclass(frozen=True)
class GroupPreference:
    """DGPO (2510.08425), and Diffusion-DPO (2311.12908) where a group has two members with A = ±1.

    c = w·σ(z)·A, z = (beta/G)·Σ A_i·w(ℓ_i − ℓ_i^ref) over the members of the draw's group, ℓ = ⟨(v − u)²⟩: the gradient of
    −log σ(−z) times G/beta, as DGPO's code has it (so that beta is only in the gate; Adam does not see the factor). For a pair
    z is DPO's argument with its β = beta. The gate σ(z) closes as the group is told apart; there is no minimum but that.
    The normalizers of the implicit rewards cancel only where Σ A = 0 and all members share σ and ε: trainer.shared_draws.
    clip: with ρ = exp(ℓ_guard − ℓ), a member whose ratio has moved beyond 1 ± clip in A's direction has c = 0; `guard` is a
    role, a fast average of the policy. reference: the role ℓ^ref is of.
    max_distance: so does a member that has passed the reference in A's direction where ⟨(v − v_ref)²⟩ is above it (TDM-R1
    2603.07700; our reading: its code takes the mean distance of a micro-batch, and the gradient would depend on its size)."""

    beta: float = 100.0
    weight: Weight = "velocity"
    reference: str = "reference"
    guard: str | None = None
    clip: float | None = None
    max_distance: float | None = None
    coupled = True
    sampled_by = None

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not self.beta > 0:
            raise ValueError(f"got beta={self.beta}; expected a number above 0")
        if (self.clip is None) != (self.guard is None) or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"got guard={self.guard!r}, clip={self.clip}; expected both, a role and a number above 0, or neither"
            )
        if self.max_distance is not None and not self.max_distance > 0:
            raise ValueError(f"got max_distance={self.max_distance}; expected a number above 0, or null for none")

    @property
    def needs(self) -> Sequence[str]:
        return [self.reference, *([self.guard] if self.guard is not None else [])]

    def value(self, found: Predictions) -> Tensor:
        """w(ℓ − ℓ^ref)."""
        reference = found.of(self.reference)
        own = found.weight(self.weight, found.live) * found.error(found.live)
        return own - found.weight(self.weight, reference) * found.error(reference)

    def couple(self, values: Tensor, draws: DrawIds) -> Tensor:
        total, size = draws.sums(draws.advantage.double().cpu() * values.double().cpu())
        return (self.beta * total / size).sigmoid()[draws.cell]

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        signal = advantage.double().to(found.live.device)
        c = found.weight(self.weight, found.live) * coupling.to(signal) * signal
        if self.guard is not None and self.clip is not None:
            ratio = (found.error(found.of(self.guard)) - found.error(found.live)).exp()
            c = torch.where(_outside(ratio, signal, self.clip), 0.0, c)
        if self.max_distance is not None:
            reference = found.of(self.reference)
            ahead = found.error(reference) - found.error(found.live)
            far = mean_square(found.live.double(), reference) > self.max_distance
            c = torch.where(far & (signal * ahead > 0), 0.0, c)
        return Coefficients(c)

    def curvature(self, advantage: Tensor) -> Tensor:
        return advantage / 2


@dataclass(frozen=True)
class CenteredReward:
    """CRD (2603.14128): the gain of each member's evidence bound over `old`, centered in its group, is regressed on its centered
    reward.

    R_i = w_old·ℓ_old − w·ℓ, p as in NFT, both less their mean over the members of the group at a draw (as a number without
    gradient); loss (5/beta)·mean (beta·R̃ − p̃)², so c = 10·w·(p̃ − beta·R̃). The release centers over the gathered batch, which
    cancels log Z(c) only where that is one group: here always the group.
    Where it stops depends on σ and on whether ε is shared in the group: a difference of bounds at one level is not a log-density
    ratio; with independent ε the regression shrinks the solution by errors in its variable. Left out: the softmax weights of the
    release (its weight_temp ≥ 0)."""

    beta: float = 1.0
    weight: Weight = "adaptive_velocity"
    advantage_clip: float = 5.0
    old: str = "old"
    coupled = True
    sampled_by = None

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not (self.beta > 0 and self.advantage_clip > 0):
            raise ValueError(f"got beta={self.beta}, advantage_clip={self.advantage_clip}; expected both above 0")

    @property
    def needs(self) -> Sequence[str]:
        return [self.old] if self.old != "policy" else []

    def value(self, found: Predictions) -> Tensor:
        """R."""
        old = found.of(self.old)
        own = found.weight(self.weight, found.live) * found.error(found.live)
        return found.weight(self.weight, old) * found.error(old) - own

    def couple(self, values: Tensor, draws: DrawIds) -> Tensor:
        """p̃ − beta·R̃."""
        gap = good_share(draws.advantage, self.advantage_clip).cpu() - self.beta * values.double().cpu()
        total, size = draws.sums(gap)
        return gap - (total / size)[draws.cell]

    def coefficients(self, found: Predictions, advantage: Tensor, coupling: Tensor) -> Coefficients:
        return Coefficients(10 * found.weight(self.weight, found.live) * coupling.double().to(found.live.device))

    def curvature(self, advantage: Tensor) -> Tensor:
        return 10 * (good_share(advantage, self.advantage_clip) - 0.5)


def good_share(advantage: Tensor, clip: float) -> Tensor:
    """p [n] float64 = A/(2·clip) + ½ inside [0, 1]: how much of a sample counts as good (DiffusionNFT)."""
    return (advantage.double() / (2 * clip) + 0.5).clamp(0, 1)


def _outside(ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """[n] whether the ratio [n] has moved beyond 1 ± clip in the direction of the advantage [n]; None: never."""
    limit = math.inf if clip is None else clip
    return ((advantage > 0) & (ratio > 1 + limit)) | ((advantage < 0) & (ratio < 1 - limit))


def check_weight(weight: str) -> None:
    """ValueError unless it is one of WEIGHTS."""
    if weight not in WEIGHTS:
        raise ValueError(f"got weight={weight!r}; expected one of {', '.join(WEIGHTS)}")
