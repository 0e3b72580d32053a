"""Searches: start noise, or paths from it, chosen by score alone (Ma et al. 2025, arXiv:2501.09732). Any reward will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.models.sampling import start_noise
from flowalign.noise_optimization.objective import Objective, Trial, best_rows
from samplers import normal, stopped


@dataclass(frozen=True)
class BestOfN:
    """Independent noise in each iteration, `candidates` of it: N = steps · candidates in all. The i-th is the start noise of a
    prompt's i-th sample in `flowalign.evaluate`."""

    needs_gradient: ClassVar[bool] = False
    candidates: int = 1

    def __post_init__(self) -> None:
        _at_least(1, candidates=self.candidates)

    def begin(self, objective: Objective, start: Tensor) -> _BestOfNWalk:
        return _BestOfNWalk(self.candidates, objective, start)


@dataclass(eq=False)
class _BestOfNWalk:
    candidates: int
    objective: Objective
    start: Tensor
    drawn: int = 0

    def step(self, rows: Tensor) -> Trial:
        numbers = range(self.drawn, self.drawn + self.candidates)
        noise = torch.stack([self._noise(row, number) for row in rows.tolist() for number in numbers])
        self.drawn += self.candidates
        return self.objective(noise, rows.repeat_interleave(self.candidates)).trial(noise)

    def _noise(self, row: int, number: int) -> Tensor:
        return self.start[row] if number == 0 else _sample_noise(self.objective, row, number).to(self.start)


@dataclass(frozen=True)
class ZeroOrder:
    """Zero-order search (2501.09732, section 3.1): the best of the pivot and its neighbors is the next pivot.

    A neighbor is √(1−s²)·pivot + s·ξ with s = `distance` and keyed normal ξ: normal as the pivot is, and at about √(2d(1−√(1−s²)))
    from it. Our reading: the paper asks for a given distance and does not say how the norm is kept. One iteration costs
    `neighbors` samples; the pivot is not made again."""

    needs_gradient: ClassVar[bool] = False
    neighbors: int = 4
    distance: float = 0.3

    def __post_init__(self) -> None:
        _at_least(1, neighbors=self.neighbors)
        if not 0 < self.distance <= 1:
            raise ValueError(f"got distance={self.distance}; expected a number in (0, 1], 1 being independent noise")

    def begin(self, objective: Objective, start: Tensor) -> _ZeroOrderWalk:
        return _ZeroOrderWalk(self, objective, start.clone(), torch.full((len(start),), -torch.inf))


@dataclass(eq=False)
class _ZeroOrderWalk:
    method: ZeroOrder
    objective: Objective
    pivots: Tensor
    best: Tensor  # [n]: the totals of the pivots
    iteration: int = 0

    def step(self, rows: Tensor) -> Trial:
        count, s = self.method.neighbors, self.method.distance
        fresh = torch.stack([self._fresh(row, k) for row in rows.tolist() for k in range(count)]).to(self.pivots)
        around = self.pivots[rows].repeat_interleave(count, 0)
        noise = (1 - s * s) ** 0.5 * around + s * fresh
        if self.iteration == 0:  # in the place of the first neighbor
            noise[::count] = self.pivots[rows]
        trial = self.objective(noise, rows.repeat_interleave(count)).trial(noise)
        best = trial.best_of_each(len(rows))
        better = best.total > self.best[rows]
        self.best[rows[better]], self.pivots[rows[better]] = best.total[better], best.noise[better].to(self.pivots)
        self.iteration += 1
        return trial

    def _fresh(self, row: int, number: int) -> Tensor:
        objective = self.objective
        return normal(objective.shape, objective.seed, "zero order", self.iteration, objective.records[row].uid, number)


@dataclass(frozen=True)
class PreviewSelect:
    """`candidates` new start noises are made in `preview_steps` steps and scored; the best `keep` of them are made in full.

    Costs candidates·preview_steps + keep·steps evaluations an iteration; in the first one the start noise is made in full besides."""

    needs_gradient: ClassVar[bool] = False
    candidates: int = 8
    keep: int = 2
    preview_steps: int = 1

    def __post_init__(self) -> None:
        _at_least(1, candidates=self.candidates, keep=self.keep, preview_steps=self.preview_steps)
        if self.keep >= self.candidates:
            raise ValueError(f"got keep={self.keep} of {self.candidates} candidates; expected fewer: nothing is chosen")

    def begin(self, objective: Objective, start: Tensor) -> _PreviewWalk:
        if self.preview_steps >= objective.settings.num_inference_steps:
            raise ValueError(
                f"got preview_steps={self.preview_steps} for a sampler of {objective.settings.num_inference_steps} steps; expected "
                "fewer: a preview that costs as much saves nothing (BestOfN makes all in full)"
            )
        return _PreviewWalk(self, objective, start)


@dataclass(eq=False)
class _PreviewWalk:
    method: PreviewSelect
    objective: Objective
    start: Tensor
    drawn: int = 1  # the start noise is number 0

    def step(self, rows: Tensor) -> Trial:
        count, keep, first = self.method.candidates, self.method.keep, self.drawn == 1
        numbers = range(self.drawn, self.drawn + count)
        noise = torch.stack([_sample_noise(self.objective, row, k) for row in rows.tolist() for k in numbers])
        noise, prompts = noise.to(self.start), rows.repeat_interleave(count)
        self.drawn += count
        states = self.objective.policy.start(noise)
        previews = self.objective.run(states, prompts, self.objective.sigmas(self.method.preview_steps))
        full = noise[best_rows(self.objective.judge(previews, prompts).total, len(rows), keep).to(noise.device)]
        if first:
            full = _with_each(full, self.start[rows])
        return self.objective(full, rows.repeat_interleave(len(full) // len(rows))).trial(full)


@dataclass(frozen=True)
class PathSearch:
    """Search over paths (2501.09732, section 3.1): states on the way are re-noised, denoised and selected.

    `paths` start noises are stepped to grid index `start`; then each state is re-noised `children` times by the path's exact
    bridge, `back` indices up, and stepped `back` + `ahead` indices down; by the score of its x0-prediction the best `paths` of a
    prompt go on, until the end of the grid. The start noise itself is made by the plain sampler besides, in the first iteration.
    Not kept: the result's image is that of its path; its noise alone leads to another one."""

    needs_gradient: ClassVar[bool] = False
    paths: int = 2
    children: int = 2
    start: int = 2
    back: int = 1
    ahead: int = 1

    def __post_init__(self) -> None:
        _at_least(1, paths=self.paths, children=self.children, start=self.start, back=self.back, ahead=self.ahead)
        if self.back >= self.start:
            raise ValueError(
                f"got back={self.back} from start={self.start}; expected less: re-noised up to the start, nothing of a path is left"
            )

    def begin(self, objective: Objective, start: Tensor) -> _PathWalk:
        if self.start >= objective.settings.num_inference_steps:
            raise ValueError(
                f"got start={self.start} for a sampler of {objective.settings.num_inference_steps} steps; expected an index before "
                "its end"
            )
        return _PathWalk(self, objective, start)


@dataclass(eq=False)
class _PathWalk:
    method: PathSearch
    objective: Objective
    start: Tensor
    iteration: int = 0

    def step(self, rows: Tensor) -> Trial:
        method, objective, sigmas = self.method, self.objective, self.objective.sigmas()
        first, end = self.iteration == 0, len(sigmas) - 1
        numbers = range(1 + self.iteration * method.paths, 1 + (self.iteration + 1) * method.paths)
        noise = torch.stack([_sample_noise(objective, row, k) for row in rows.tolist() for k in numbers]).to(self.start)
        prompts, index = rows.repeat_interleave(method.paths), method.start
        x = objective.run(objective.policy.start(noise), prompts, sigmas[: index + 1])
        while index < end:
            below = min(index + method.ahead, end)
            x, noise = (each.repeat_interleave(method.children, 0) for each in (x, noise))
            prompts = prompts.repeat_interleave(method.children)
            above = index - method.back
            x = objective.policy.path.bridge(x, self._fresh(prompts, index).to(x), sigmas[index], sigmas[above])
            x = objective.run(x, prompts, sigmas[above : below + 1])
            index = below
            if index < end:
                clean = objective.run(x, prompts, stopped(sigmas, index)[index:])
                keep = best_rows(objective.judge(clean, prompts).total, len(rows), method.paths)
                x, noise, prompts = x[keep.to(x.device)], noise[keep.to(noise.device)], prompts[keep]
        self.iteration += 1
        if first:  # the plain sample beside the paths
            plain = objective.run(objective.policy.start(self.start[rows]), rows, sigmas)
            x, noise = _with_each(x, plain), _with_each(noise, self.start[rows])
        return objective.judge(x, rows.repeat_interleave(len(x) // len(rows))).trial(noise)

    def _fresh(self, prompts: Tensor, index: int) -> Tensor:
        objective, seen, draws = self.objective, dict[int, int](), []
        for row in prompts.tolist():
            number = seen[row] = seen.get(row, -1) + 1
            key = (objective.seed, "paths", self.iteration, index, objective.records[row].uid, number)
            draws.append(normal(objective.shape, *key))
        return torch.stack(draws)


def _sample_noise(objective: Objective, row: int, number: int) -> Tensor:
    """The start noise of a prompt's sample `number` in `flowalign.evaluate`."""
    return start_noise(objective.shape, objective.seed, objective.records[row], number)


def _with_each(several: Tensor, one: Tensor) -> Tensor:
    """[n·K, *] and [n, *] as [n·(K+1), *], the one before the K."""
    grouped = several.view(len(one), -1, *several.shape[1:])
    return torch.cat([one[:, None], grouped], 1).flatten(0, 1)


def _at_least(smallest: int, **numbers: int) -> None:
    if wrong := {name: number for name, number in numbers.items() if number < smallest}:
        raise ValueError(f"got {wrong}; expected at least {smallest} of each")
