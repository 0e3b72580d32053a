"""Grids of noise levels: fp32 tensors [T+1], from 1 (or just below) down to exactly 0.

Store the grid that was used: a rollout and its update must never use two different ones. A Schedule is what a
configuration names; the functions below compute the grids of papers and of diffusers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from samplers.paths import Path

Own = Callable[[int], Tensor]  # number of steps -> the family's own grid [T+1]
Levels = TypeVar("Levels", float, np.ndarray, Tensor)


def shift(u: Levels, k: float) -> Levels:
    """f_k(u) = k·u / (1 + (k-1)·u): moves levels in [0, 1] towards noise for k > 1 (SD3 and FLUX 3, video 5)."""
    return k * u / (1 + (k - 1) * u)


def plain_sigmas(num_steps: int, k: float = 3.0) -> Tensor:
    """σ_i = f_k(1 - i/T), i = 0..T: the grid of DanceGRPO, MixGRPO, BranchGRPO. Computed in float64."""
    _check(num_steps, k)
    return torch.from_numpy(shift(1.0 - np.arange(num_steps + 1) / num_steps, k)).to(torch.float32)


def diffusers_sigmas(num_steps: int, k: float = 3.0, num_train: int = 1000) -> Tensor:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler(shift=k), bit for bit: it shifts TWICE.

    The constructor shifts `num_train` levels; set_timesteps spaces T points between the largest and the smallest of
    these and shifts again (diffusers issue 13243). The last step before 0 is therefore nearly empty (0.0089 at k=3).
    """
    _check(num_steps, k)
    train = torch.arange(num_train, 0, -1, dtype=torch.float32) / num_train
    once = shift(train, k)
    points = np.linspace(once[0].item() * num_train, once[-1].item() * num_train, num_steps) / num_train
    return _append_zero(torch.from_numpy(shift(points, k)).to(torch.float32))


def dynamic_sigmas(
    num_steps: int,
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Tensor:
    """FLUX's grid, bit for bit its pipeline's: u = linspace(1, 1/T, T), σ = e^m/(e^m + 1/u - 1), then 0.

    m grows linearly with the number of image tokens; e^m takes the place of k. Some repositories write 1.16 for 1.15.
    """
    _check(num_steps, 1.0)
    if image_tokens < 1:
        raise ValueError(f"got image_tokens={image_tokens}; expected the number of latent patches, (h/16)·(w/16)")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    m = image_tokens * slope + (base_shift - slope * base_tokens)
    u = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    return _append_zero(torch.from_numpy(math.exp(m) / (math.exp(m) + (1 / u - 1))).to(torch.float32))


def stopped(sigmas: Tensor, step: int) -> Tensor:
    """The first `step`+1 levels of a grid, then 0: its last step jumps from level `step` to the predicted clean data x̂0.

    What ReFL (2304.05977) and DRTune score. ValueError for a step outside 0..T-1."""
    if not 0 <= step < len(sigmas) - 1:
        raise ValueError(f"got step={step}; expected a number inside 0..{len(sigmas) - 2}, a step of the grid")
    return torch.cat([sigmas[: step + 1], sigmas.new_zeros(1)])


def subgrid(index: int, num_steps: int, count: int) -> list[int]:
    """The `count` grid indices after `index` up to num_steps, as even as whole steps allow (halves go up).

    All the remaining ones if there are no more than `count`.
    """
    left = num_steps - index
    count = min(count, left)
    return [index + (2 * j * left + count) // (2 * count) for j in range(1, count + 1)]


def check_sigmas(sigmas: Tensor) -> None:
    """A grid is one-dimensional, of at least two levels, strictly decreasing inside [0, 1]."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(f"got sigmas {sigmas.dtype}{list(sigmas.shape)}; expected floating point [T+1] with T >= 1")
    if not (bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0.0 and float(sigmas[0]) <= 1.0):
        raise ValueError(
            f"got sigmas {sigmas[:12].tolist()}; expected strictly decreasing levels inside [0, 1], from noise to "
            "data: check for a reversed grid or for timesteps 0..1000 passed as sigmas"
        )


# ---------------------------------------------------------------------------------------------- schedules as parts


class Schedule(Protocol):
    """Which grid a rollout and an evaluation step over; the exported pipeline call gets the same levels."""

    def sigmas(self, num_steps: int, own: Own) -> Tensor:
        """fp32 [T+1] for T = num_steps, from noise (σ of at least 0.99) to exactly 0, or to where own(T) ends.

        own: the grid of the policy's family, as its scheduler has it. ValueError for a number of steps that it has not."""
        ...


@dataclass(frozen=True)
class FamilyGrid:
    """The family's own grid, as the pipeline's scheduler has it: what is used where no schedule is named."""

    def sigmas(self, num_steps: int, own: Own) -> Tensor:
        """own(T)."""
        return own(num_steps)


@dataclass(frozen=True)
class PlainShift:
    """`plain_sigmas`: the shift k applied once, where diffusers applies it twice and wastes the last step.

    At T = 4 and k = 3: 1, 0.9, 0.75, 0.5, 0, the grid of TDM-R1 (2603.07700); diffusers': 1, 0.858, 0.602, 0.009, 0."""

    k: float = 3.0

    def __post_init__(self) -> None:
        _check(1, self.k)

    def sigmas(self, num_steps: int, own: Own) -> Tensor:
        """f_k(1 - i/T)."""
        return plain_sigmas(num_steps, self.k)


@dataclass(frozen=True)
class Listed:
    """These levels, without the last 0, as a pipeline's argument `sigmas`: the few steps a distilled model was trained
    on. Timesteps of 1000 are levels times 1000: (1000, 900, 750, 500) is (1, 0.9, 0.75, 0.5). It has one number of steps.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        check_sigmas(torch.tensor([*self.levels, 0.0]))

    def sigmas(self, num_steps: int, own: Own) -> Tensor:
        """The levels, then 0. ValueError for another number of steps than that of the list."""
        if num_steps != len(self.levels):
            raise ValueError(
                f"got num_inference_steps={num_steps} with the {len(self.levels)} levels of {self}; expected as many steps as "
                "levels: change one of them, or take another schedule there"
            )
        return torch.tensor([*self.levels, 0.0])


def sigmas_of(schedule: Schedule | None, num_steps: int, own: Own) -> Tensor:
    """The grid [T+1] of a schedule, checked; None: own(T). ValueError for a grid that a rollout cannot step over."""
    if schedule is None:
        return own(num_steps)
    sigmas = schedule.sigmas(num_steps, own)
    check_sigmas(sigmas)
    ends = float(sigmas[-1]) == 0 or float(sigmas[-1]) == float(own(num_steps)[-1])
    if sigmas.dtype != torch.float32 or len(sigmas) != num_steps + 1 or float(sigmas[0]) < 0.99 or not ends:
        raise ValueError(
            f"got {sigmas.dtype} levels {sigmas[:12].tolist()} from {schedule} for {num_steps} steps; expected fp32 "
            f"[{num_steps + 1}] from at least 0.99, where the states are the start noise, down to 0"
        )
    return sigmas


def check_schedule(schedule: Schedule | None, num_steps: int, path: Path, takes_levels: bool = True) -> None:
    """What `sigmas_of` refuses, before a model is loaded; and a grid other than its own for a policy on discrete levels, or one
    whose pipeline takes no levels."""
    own = 0.9987 * plain_sigmas(num_steps, math.pi)  # of no family: only a schedule that asks for it returns it
    if torch.equal(sigmas_of(schedule, num_steps, lambda steps: own), own) or (path.rectified and takes_levels):
        return
    kind = "whose pipeline takes no levels" if path.rectified else f"on discrete levels ({type(path).__name__})"
    raise ValueError(
        f"got {schedule} for a policy {kind}; expected the family's own grid, since its scheduler takes no other: leave the schedule "
        "out"
    )


def even_sigmas(num_steps: int, path: Path) -> Tensor:
    """[T+1] in equal steps, each on the nearest level that `path` knows: stands for the grid of a model that is not loaded yet."""
    return _append_zero(path.nearest(torch.linspace(1, 0, num_steps + 1)[:-1]))


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1)])


def _check(num_steps: int, k: float) -> None:
    if num_steps < 1:
        raise ValueError(f"got num_steps={num_steps}; expected at least 1 denoising step")
    if not k > 0:
        raise ValueError(f"got shift k={k}; expected a number > 0 (1 = no shift)")
