"""The keyed draws of forward-process objectives, bridges and SPSA: per sample, the same whatever the batch.

An objective of states trains at x = a(σ)·x0 + b(σ)·ε. A SigmaLaw says where σ comes from; SampleKeys draws it, ε, and random
signs for each sample by its key (seed, stream, iteration, uid, visit, sample, draw). Streams: "sigma", "renoise", "spsa".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from samplers.noise import generator, normal, visits
from samplers.paths import Path
from samplers.schedules import shift
from samplers.trees import Tree

T = TypeVar("T")
SHARED = -1  # the sample number of draws that all samples of a group have in common


class SigmaLaw(Protocol):
    """The law of the noise levels of one sample's draws."""

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """`count` levels in (0, 1). grid: the levels of the rollout, from noise to data, without the end."""
        ...


@dataclass(frozen=True)
class UniformSigma:
    """Uniform on [low, high): RVM; (0, 1) with `strata`: V-GRPO 2604.23380.

    strata: draw j of n comes from the j-th of n equally probable parts, so that the draws of a sample cover the law."""

    low: float = 0.0
    high: float = 1.0
    strata: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"got UniformSigma(low={self.low}, high={self.high}); expected 0 <= low < high <= 1")

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """low + (high - low)·u."""
        return [self.low + (self.high - self.low) * u for u in _uniform(rng, count, self.strata)]


@dataclass(frozen=True)
class ShiftedUniform:
    """Uniform in un-shifted time above a boundary: σ = f_k(u), u uniform on [f_k⁻¹(low) + margin, 1] (TDM 2503.06674 and
    TDM-R1 2603.07700, where `low` is the level from which a bridge sets out; their code has a margin of 20 of 1000 steps)."""

    low: float = 0.0
    k: float = 3.0
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not (self.k > 0 and self.margin > 0 and 0.0 <= self.low <= 1.0):
            raise ValueError(f"got {self}; expected k and margin above 0, and low inside [0, 1]")
        if not self._begin < 1.0:
            raise ValueError(
                f"got ShiftedUniform(low={self.low}, k={self.k}, margin={self.margin}), which leaves no level between low and 1; "
                "expected a lower low or a smaller margin"
            )

    @property
    def _begin(self) -> float:
        return shift(self.low, 1.0 / self.k) + self.margin  # f_{1/k} is the inverse of f_k

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """f_k(begin + (1 - begin)·u)."""
        return [shift(self._begin + (1.0 - self._begin) * u, self.k) for u in _uniform(rng, count, False)]


@dataclass(frozen=True)
class SquareRootSigma:
    """Density 2σ, σ = √u: RAM 2605.10759. Biased to noise, mean 2/3. strata: as in UniformSigma."""

    strata: bool = False

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """√u."""
        return [math.sqrt(u) for u in _uniform(rng, count, self.strata)]


@dataclass(frozen=True)
class LogitNormalSigma:
    """σ = sigmoid(mean + std·z), then the shift f_k: the law SD3 was trained with (2403.03206, k 1) and that of
    fine-tuning on selected samples (RAFT, Diffusion-DPO), with k that of the model's schedule in flow_grpo's and diffusers' code
    (SD3.5: 3). k > 1 moves mass towards noise. strata: as in UniformSigma."""

    mean: float = 0.0
    std: float = 1.0
    k: float = 1.0
    strata: bool = False

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.k > 0):
            raise ValueError(f"got LogitNormalSigma(std={self.std}, k={self.k}); expected both above 0")

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """The inverse of the distribution function at u."""
        normals = [NormalDist(self.mean, self.std).inv_cdf(u) for u in _uniform(rng, count, self.strata)]
        return [shift(1.0 / (1.0 + math.exp(min(-value, 700.0))), self.k) for value in normals]


@dataclass(frozen=True)
class GridSigma:
    """Levels of the rollout's grid without replacement, from its first `fraction` (from the noise end): DiffusionNFT
    2509.16117 takes all of .99 (9 of 10 steps), AWM 2509.25050 six of .9, DGPO 2510.08425 four of the noisiest 7."""

    fraction: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"got GridSigma(fraction={self.fraction}); expected a number inside (0, 1]")

    def draw(self, rng: np.random.Generator, count: int, grid: Sequence[float]) -> Sequence[float]:
        """ValueError for more draws than levels."""
        levels = grid[: max(1, math.floor(self.fraction * len(grid) + 1e-9))]
        if count > len(levels):
            raise ValueError(
                f"got {count} draws of the {len(levels)} levels that fraction={self.fraction} leaves of a grid of {len(grid)}; "
                "expected at most as many: draw fewer, or take more steps"
            )
        return [levels[number] for number in rng.permutation(len(levels))[:count]]


@dataclass(frozen=True)
class SampleKeys:
    """What keys the draws of N samples: rows (uid, visit, sample), each [N]. Every draw is a function of its row's key
    and of nothing else in the batch."""

    seed: int
    iteration: int
    rows: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(
        seed: int,
        iteration: int,
        tree: Tree,
        nodes: Tensor,
        uids: Sequence[int],
        numbers: Sequence[int] | None = None,
    ) -> SampleKeys:
        """Those of `nodes` [N] of a rolled-out tree, usually its leaves: the sample is the node's `local`, which neither
        batching nor selection changes. uids, numbers: of each group, as the uids and visits of KeyedNoise."""
        if tree.num_groups != len(uids):
            raise ValueError(f"got {len(uids)} uids for {tree.num_groups} groups; expected one uid per group")
        visit = visits(uids) if numbers is None else numbers
        groups, local = tree.group[nodes].tolist(), tree.local[nodes].tolist()
        return SampleKeys(
            seed, iteration, tuple((uids[g], visit[g], sample) for g, sample in zip(groups, local, strict=True))
        )

    def at(self, index: Tensor) -> SampleKeys:
        """Those of the samples `index` [n]."""
        return replace(self, rows=tuple(self.rows[row] for row in index.tolist()))

    def shared(self) -> SampleKeys:
        """Keys by which all samples of a group draw the same (V-GRPO, DGPO, pairs of Diffusion-DPO)."""
        return replace(self, rows=tuple((uid, visit, SHARED) for uid, visit, _ in self.rows))

    def sigmas(self, law: SigmaLaw, count: int, grid: Tensor, path: Path, stream: str = "sigma") -> Tensor:
        """[N, count] fp32: `count` levels of each sample by `law`, moved to the path's nearest.

        grid: the rollout's sigmas [T+1]. All of a row come from one key, since laws may couple them."""
        if count < 1:
            raise ValueError(f"got count={count} draws; expected at least 1")
        levels = grid[:-1].double().tolist()
        drawn = self._each(lambda *key: list(law.draw(generator(*key), count, levels)), stream)
        sigma = torch.tensor(drawn, dtype=torch.float64).reshape(-1, count)
        if not bool(((sigma > 0) & (sigma <= 1)).all()):
            raise ValueError(f"got levels {sigma.flatten()[:8].tolist()} from {law}; expected numbers inside (0, 1]")
        return path.nearest(sigma).float()

    def noise(self, shape: Sequence[int], draw: int, stream: str = "renoise") -> Tensor:
        """[N, *shape] fp32 of independent N(0, 1): ε of the `draw`-th re-noising, of a bridge (a stream of its own)."""
        return self._stack(lambda *key: normal(shape, *key), shape, stream, draw)

    def signs(self, shape: Sequence[int], draw: int, stream: str = "spsa") -> Tensor:
        """[N, *shape] fp32 of independent ±1, equally likely: the directions of SPSA."""

        def one(*key: int | str) -> Tensor:
            return torch.from_numpy(generator(*key).integers(0, 2, tuple(shape)).astype(np.float32) * 2 - 1)

        return self._stack(one, shape, stream, draw)

    def _stack(self, one: Callable[..., Tensor], shape: Sequence[int], stream: str, draw: int) -> Tensor:
        parts = self._each(one, stream, draw)
        return torch.stack(parts) if parts else torch.empty(0, *shape)

    def _each(self, one: Callable[..., T], stream: str, *draw: int) -> list[T]:
        """one(*key) for each row; a key that rows share is drawn once."""
        known = {row: one(self.seed, stream, self.iteration, *row, *draw) for row in dict.fromkeys(self.rows)}
        return [known[row] for row in self.rows]


def _uniform(rng: np.random.Generator, count: int, strata: bool) -> list[float]:
    """`count` numbers in (0, 1): independent, or the j-th inside ((j, j+1)/count)."""
    u = [
        (int(value) + 0.5) / 2**32 for value in rng.integers(0, 2**32, count)
    ]  # exact; never 0 (clean data) and never 1
    return [(j + value) / count for j, value in enumerate(u)] if strata else u
