"""From start noise to scores: the deterministic sampler, the decoder and the rewards, for prompts that are encoded once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flowalign.data import PromptRecord, source_images
from flowalign.models.base import Policy, Sampling
from flowalign.models.conditions import Conditions
from flowalign.models.grid import grid
from rewards import Reward, RewardBatch, labels_of, pictures, score
from samplers import unroll


@dataclass(frozen=True, eq=False)
class Trial:
    """Candidates with what was made of them, a row each: start noise [m, *], final latents [m, *], images [m, 3, H, W] or
    [m, F, 3, H, W], total [m] (the weighted sum of the scores) and scores {label: [m]}; nan: not valid. On the CPU, without
    graph."""

    noise: Tensor
    latents: Tensor
    images: Tensor
    total: Tensor
    scores: dict[str, Tensor]

    def at(self, rows: Tensor) -> Trial:
        """The candidates `rows`, in that order."""
        scores = {name: values[rows] for name, values in self.scores.items()}
        return Trial(self.noise[rows], self.latents[rows], self.images[rows], self.total[rows], scores)

    def first_of_each(self, prompts: int) -> Trial:
        """Of candidates in the order of their prompts, as many for each, the first of each prompt."""
        return self.at(torch.arange(0, len(self.total), len(self.total) // prompts))

    def best_of_each(self, prompts: int) -> Trial:
        """The best of each prompt; of equal ones the first."""
        return self.at(best_rows(self.total, prompts, 1))


def best_rows(total: Tensor, prompts: int, keep: int) -> Tensor:
    """Of totals [prompts·K] in the order of their prompts the row numbers of each prompt's `keep` best, ascending; nan is
    last, and of equal ones the first stays."""
    table = total.detach().cpu().view(prompts, -1)
    order = table.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :keep]
    return (order.sort(dim=1).values + torch.arange(prompts)[:, None] * table.shape[1]).flatten()


@dataclass(frozen=True, eq=False)
class Scored:
    """Latents, images and scores of m candidates, as in Trial but where they were made, and with their graph if there is
    one."""

    latents: Tensor
    images: Tensor
    total: Tensor
    scores: dict[str, Tensor]

    def trial(self, noise: Tensor) -> Trial:
        """With the start noise [m, *] from which they were made."""
        noise, latents, images, total = (t.detach().cpu() for t in (noise, self.latents, self.images, self.total))
        scores = {name: values.detach().cpu() for name, values in self.scores.items()}
        return Trial(noise, latents, images, total, scores)


@dataclass(eq=False)
class Objective:
    """The scores of start noise, as a function. rewards: each with its weight. batch_size: candidates at once where no
    gradient is asked for. evaluations: network rows so far, by the policy's own counter; what a backward recomputes is not
    counted. images: so many were decoded and scored."""

    policy: Policy
    records: Sequence[PromptRecord]
    conditions: Conditions
    settings: Sampling
    rewards: Sequence[tuple[Reward, float]]
    seed: int
    batch_size: int
    checkpoint: bool = False
    evaluations: int = field(default=0, init=False)
    images: int = field(default=0, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return self.policy.latent_shape(self.settings.size)

    def sigmas(self, num_inference_steps: int | None = None) -> Tensor:
        """The grid [T+1], by default of as many steps as the settings say."""
        steps = num_inference_steps or self.settings.num_inference_steps
        return grid(self.policy, self.settings.schedule, steps, self.shape)

    def __call__(self, noise: Tensor, rows: Tensor) -> Scored:
        """Candidates [m, *] for the prompts `rows` [m], without gradient."""
        return self.judge(self.run(self.policy.start(noise), rows, self.sigmas()), rows)

    @torch.no_grad()
    def run(self, x: Tensor, rows: Tensor, sigmas: Tensor) -> Tensor:
        """States [m, *] at sigmas[0] stepped down to sigmas[-1], without gradient."""
        parts = zip(x.split(self.batch_size), rows.split(self.batch_size), strict=True)
        return torch.cat([self._steps(part, prompts, sigmas) for part, prompts in parts])

    @torch.no_grad()
    def judge(self, latents: Tensor, rows: Tensor) -> Scored:
        """Clean latents [m, *] decoded and scored, without gradient."""
        parts = zip(latents.split(self.batch_size), rows.split(self.batch_size), strict=True)
        return _joined([self._score(part, prompts, grad=False) for part, prompts in parts])

    def with_gradient(
        self, noise: Tensor, rows: Tensor, *, active: Collection[int] | None, detach_uncond: bool
    ) -> Scored:
        """As the call, all m at once and with the graph from the totals to `noise`. active: see `samplers.unroll`."""
        latents = self._steps(self.policy.start(noise), rows, self.sigmas(), active, detach_uncond)
        return self._score(latents, rows, grad=True)

    def _steps(
        self, x: Tensor, rows: Tensor, sigmas: Tensor, active: Collection[int] | None = None,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        conditions, before = self.conditions.rows(rows), self.policy.evaluations

        def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
            return self.policy.velocity(
                x, sigma, conditions.rows(root), guidance_scale=self.settings.guidance_scale,
                detach_uncond=detach_uncond,
            )  # fmt: skip

        unrolled = unroll(
            velocity, x, sigmas, self.policy.solver(), active=active,
            checkpoint=self.checkpoint and torch.is_grad_enabled() and len(sigmas) > 2,
        )  # fmt: skip
        self.evaluations += self.policy.evaluations - before
        return unrolled.x

    def _score(self, latents: Tensor, rows: Tensor, *, grad: bool) -> Scored:
        self.images += len(latents)
        return self.judge_images(latents, self.policy.decode(latents, grad=grad), rows, grad=grad)

    def judge_images(self, latents: Tensor, images: Tensor, rows: Tensor, *, grad: bool = False) -> Scored:
        """What was decoded already, scored."""
        records = [self.records[row] for row in rows.tolist()]
        batch = RewardBatch(
            prompts=[record.prompt for record in records],
            metadata=[record.metadata for record in records],
            group_ids=[record.uid for record in records],
            conditions=source_images(records, latents.device),
            latents=latents,
            sigma=latents.new_zeros(len(latents)),
            **pictures(images, self.settings.fps),
        )
        total, scores = latents.new_zeros(len(latents)), dict[str, Tensor]()
        for reward, weight in self.rewards:
            output = score(reward, batch, grad=grad and weight != 0, max_fail_rate=1.0)
            values = output.scores.to(total.device)
            scores.update(zip(labels_of(reward), values.T, strict=True))
            if weight:  # one of weight 0 is watched only: where it has no score, the others still count
                total = total + weight * values.sum(1)
        return Scored(latents, images, total, scores)


class Walk(Protocol):
    """A method at work on n prompts."""

    def step(self, rows: Tensor) -> Trial:
        """One iteration for the prompts `rows` of the n, as many candidates for each, in the order of `rows`. In the first
        iteration a prompt's first candidate is the plain sample of its start noise."""
        ...


class Method(Protocol):
    """How better noise is found. needs_gradient: of the rewards."""

    needs_gradient: ClassVar[bool]

    def begin(self, objective: Objective, start: Tensor) -> Walk:
        """From start noise [n, *], a row per prompt of the objective, on the network's device."""
        ...


def _joined(parts: Sequence[Scored]) -> Scored:
    return Scored(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.images for part in parts]),
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
    )
