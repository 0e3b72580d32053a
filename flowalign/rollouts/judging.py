"""What rewards get of a rollout: states decoded part by part, and their scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
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
    stream: torch.cuda.Stream | None = None,
) -> RewardBatch:  # fmt: skip
    """Latents [n, *] of the groups `owner` [n] as a reward that reads `inputs` gets them, with what it may know of them.

    Decoded only if it reads images or videos, in parts of rollout.micro_batch. sigma [n]: their noise levels, 0 by default.
    numbers: of the samples, 0..n-1 by default. grad: see Policy.decode. stream: the one that decodes, if it is not that of other
    threads: it is waited for, since a reward may ask from threads of its own."""
    groups, fields = owner.tolist(), {}
    if set(inputs) & {"images", "videos"}:
        began = time.perf_counter()
        pixels = torch.cat([task.policy.decode(part, grad) for part in latents.split(task.rollout.micro_batch)])
        fields = pictures(pixels, task.fps)
        if stream is not None:
            stream.synchronize()
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

    device: where the reward gets latents; None: where they are. beside: a thread decodes and scores while the caller goes on, with
    latents of the host, what one `add` brought after the other, of which one waits at most. On CUDA it has a stream of its own, where
    nothing begins before what the caller's stream was given until the `add`; behind the context that stream waits for it. The
    caller neither decodes nor scores meanwhile: offloaded parts, `task.counts` and a reward's isolation are the thread's."""

    def __init__(
        self, task: Task, prompts: Sequence[PromptRecord], reward: Reward, device: torch.device | None = None,
        *, beside: bool = False,
    ) -> None:  # fmt: skip
        self._task, self._prompts, self._reward, self._device = task, prompts, reward, device
        self._stream = side_stream(device) if beside and device is not None else None
        self._beside, self._scoring = beside, Scoring(reward, self._aside if beside else None)
        self._order, self._decoding = list[int](), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._scoring.__exit__(kind, error, traceback)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def add(self, owner: Tensor, latents: Tensor, sigma: Tensor | None = None) -> None:
        """Latents [n, *] of the groups `owner` [n], at the noise levels sigma [n] (None: 0). Groups come whole."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._scoring.add(self._parts(owner, latents, sigma))

    def result(self, max_fail_rate: float = 0.5) -> RewardOutput:
        """The answer on all that was added, in its order; see `rewards.Scoring.result`."""
        output, order = self._scoring.result(max_fail_rate), torch.tensor(self._order, dtype=torch.long)
        return output if bool((order.diff() == 1).all()) else at_rows(output, order.argsort())

    def seconds(self, scoring: float) -> dict[str, float]:
        """Of decoding, without what was hidden behind the caller's work, and what was, of decoding and of the seconds of `scoring`: as
        much of both as the thread did while nobody waited for it."""
        if not (self._beside or self._reward.spec.elsewhere):
            return {"decode": self._decoding}
        aside = scoring + self._decoding * self._beside
        hidden = max(0.0, 1 - self._scoring.waited / aside) if aside else 0.0
        found = {"decode": self._decoding, "reward_hidden": hidden * scoring}
        if self._beside:
            found |= {"decode": (1 - hidden) * self._decoding, "decode_hidden": hidden * self._decoding}
        return found

    def _parts(self, owner: Tensor, latents: Tensor, sigma: Tensor | None) -> Iterator[RewardBatch]:
        task, spec, first = self._task, self._reward.spec, len(self._order)
        task.counts.reward_calls += len(latents)
        for rows in rows_of_chunks(owner.tolist(), task.rollout.micro_batch, groupwise=spec.groupwise):
            numbers, levels = [first + row for row in rows], None if sigma is None else sigma[rows]
            self._order += numbers
            yield self._part(owner[rows], latents[rows], levels, numbers)

    def _part(self, owner: Tensor, latents: Tensor, sigma: Tensor | None, numbers: list[int]) -> RewardBatch:
        task, before = self._task, self._task.counts.decode_seconds
        part = latents.to(self._device or latents.device)
        inputs = self._reward.spec.inputs
        batch = decoded(task, self._prompts, owner, part, inputs, sigma, numbers, stream=self._stream)
        self._decoding += task.counts.decode_seconds - before
        return batch

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What a thread has of its own, and not of the one that started it: its grad mode, device and stream."""
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One for all iterations, since the allocator keeps memory for each stream; None where it is not CUDA."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def judge(
    task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor, reward: Reward,
    sigma: Tensor | None = None, max_fail_rate: float = 0.5, device: torch.device | None = None,
) -> RewardOutput:  # fmt: skip
    """The scores of latents [n, *] of the groups `owner` [n], see `Judging`."""
    with Judging(task, prompts, reward, device) as judging:
        judging.add(owner, latents, sigma)
        return judging.result(max_fail_rate)
