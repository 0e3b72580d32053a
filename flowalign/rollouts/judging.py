"""What rewards get of a rollout: states decoded part by part, and their scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from flowalign.data import PromptRecord, source_images
from flowalign.rollouts.task import Task
from rewards import Reward, RewardBatch, RewardOutput, Scoring, pictures
from rewards.answers import at_rows
from rewards.parts import rows_of_chunks


def decoded(
    task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor, inputs: Sequence[str] = ("images",),
    sigma: Tensor | None = None, numbers: Sequence[int] | None = None, grad: bool = False,
) -> RewardBatch:  # fmt: skip
    """Latents [n, *] of the groups `owner` [n] as a reward that reads `inputs` gets them, with what it may know of them.

    Decoded only if it reads images or videos, in parts of rollout.micro_batch. sigma [n]: their noise levels, 0 by default.
    numbers: of the samples, 0..n-1 by default. grad: see Policy.decode."""
    groups, fields = owner.tolist(), {}
    if set(inputs) & {"images", "videos"}:
        began = time.perf_counter()
        pixels = torch.cat([task.policy.decode(part, grad) for part in latents.split(task.rollout.micro_batch)])
        fields = pictures(pixels, task.fps)
        task.counts.decodes += len(latents)
        task.counts.decode_seconds += time.perf_counter() - began
    if "latents" in inputs:
        levels = torch.zeros(len(latents)) if sigma is None else sigma
        fields |= {"latents": latents, "sigma": levels.to(latents.device, torch.float32)}
    return RewardBatch(
        prompts=[prompts[group].prompt for group in groups],
        metadata=[prompts[group].metadata for group in groups],
        sample_ids=list(range(len(groups)) if numbers is None else numbers),
        group_ids=groups,
        conditions=source_images([prompts[group] for group in groups], latents.device),
        **fields,
    )


class Judging:
    """Latents scored by one reward, in parts of rollout.micro_batch (of a groupwise one: whole groups): a part is decoded,
    scored and freed before the next, or scored elsewhere while the next is made. A context, as `rewards.Scoring` is.

    device: where the reward gets latents; None: where they are."""

    def __init__(
        self, task: Task, prompts: Sequence[PromptRecord], reward: Reward, device: torch.device | str | None = None
    ) -> None:
        self._task, self._prompts, self._reward, self._device = task, prompts, reward, device
        self._scoring, self._order = Scoring(reward), list[int]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._scoring.__exit__(kind, error, traceback)

    def add(self, owner: Tensor, latents: Tensor, sigma: Tensor | None = None) -> None:
        """Latents [n, *] of the groups `owner` [n], at the noise levels sigma [n] (None: 0). Groups come whole."""
        task, spec, first = self._task, self._reward.spec, len(self._order)
        task.counts.reward_calls += len(latents)
        for rows in rows_of_chunks(owner.tolist(), task.rollout.micro_batch, groupwise=spec.groupwise):
            numbers, levels = [first + row for row in rows], None if sigma is None else sigma[rows]
            self._order += numbers
            part = latents[rows].to(self._device or latents.device)
            self._scoring.add(decoded(task, self._prompts, owner[rows], part, spec.inputs, levels, numbers))

    def result(self, max_fail_rate: float = 0.5) -> RewardOutput:
        """The answer on all that was added, in its order; see `rewards.Scoring.result`."""
        output, order = self._scoring.result(max_fail_rate), torch.tensor(self._order, dtype=torch.long)
        return output if bool((order.diff() == 1).all()) else at_rows(output, order.argsort())

    @property
    def waited(self) -> float:
        """Seconds in which the rollout waited for scores."""
        return self._scoring.waited


def judge(
    task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor, reward: Reward,
    sigma: Tensor | None = None, max_fail_rate: float = 0.5, device: torch.device | str | None = None,
) -> RewardOutput:  # fmt: skip
    """The scores of latents [n, *] of the groups `owner` [n], see `Judging`."""
    with Judging(task, prompts, reward, device) as judging:
        judging.add(owner, latents, sigma)
        return judging.result(max_fail_rate)
