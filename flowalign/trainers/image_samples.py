"""Images and clips of files as samples: preferred pairs (offline Diffusion-DPO), and those that show their prompts (fine-tuning, RAFT)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowalign.buckets import prompts_of_iteration
from flowalign.clips import read_sample
from flowalign.data import PromptRecord
from flowalign.image_sets import (
    ImagePair,
    LabeledImage,
    check_images_of,
    check_not_held_out,
    digest_of,
    load_labeled,
    load_pairs,
    request_of,
)
from flowalign.media import Place
from flowalign.models.grid import grid
from flowalign.rollouts.gather import encoded, gather_output
from flowalign.rollouts.judging import judge
from flowalign.rollouts.metrics import cost_metrics, reward_metrics
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import Setup
from flowalign.trainers.samples import Places, Samples
from samplers import Deterministic, Held, SampleKeys, generator
from samplers.noise import visits

_FREE = {f"cost/{name}_per_image": 0.0 for name in ("rollout", "decodes", "reward_calls")}


class ImageLatents:
    """The latents of files of images or clips, fp32 on the CPU: each file is encoded once by a process that needs it, and alone, since in a batch
    its rounding would depend on the others; so a resumed run has the same bits. All are kept: 4 bytes per element, 256 KiB of an
    SD3 image of 512²."""

    def __init__(self) -> None:
        self._known: dict[Place, Tensor] = {}

    def clear(self) -> None:
        """Forgets all: another policy has another encoder."""
        self._known.clear()

    def of(self, task: Task, files: Sequence[Place]) -> Tensor:
        """[n, *] of n files."""
        for path in dict.fromkeys(files):
            if path not in self._known:
                self._known[path] = task.policy.encode_images(read_sample(path)[None].float() / 255)[0].cpu()
        return torch.stack([self._known[path] for path in files])


@dataclass(frozen=True, eq=False)
class GivenSamples:
    """Images or clips of files as the batch of an iteration; nothing was rolled out."""

    samples: Samples
    iteration: int
    metrics: dict[str, float]

    @property
    def images(self) -> int:
        return len(self.samples.places)

    def picture(self) -> bytes | None:
        return None


@dataclass(frozen=True)
class FromPairs:
    """Pairs of `file`, a .jsonl of {prompt, chosen, rejected}, images or clips (flowalign.image_sets.load_pairs), such as the votes on a page of
    `flowalign evaluate`: each is a group of two samples with the scores 1, chosen, and 0 in the channel "chosen".

    For offline Diffusion-DPO (2311.12908): advantage BestAndWorst, objective GroupPreference, shared_draws. An iteration has
    `rollout.groups` pairs, in an order that is shuffled for each epoch by the seed. Images are encoded by the VAE's mean. The
    run's `prompts` are not trained on (rewards are tried with them)."""

    file: str
    role = None
    rolled = False

    @cached_property
    def _pairs(self) -> list[ImagePair]:
        return load_pairs(self.file)

    @cached_property
    def _latents(self) -> ImageLatents:
        return ImageLatents()

    def check(self, setup: Setup) -> None:
        _check(self._pairs, setup)
        if setup.rollout.group_size != 2:
            raise ValueError(
                f"got rollout.group_size={setup.rollout.group_size} with pairs of images; expected 2, chosen and rejected"
            )

    def channels(self, reward: tuple[str, ...]) -> tuple[str, ...]:
        return ("chosen",)

    def notes(self) -> tuple[str, ...]:
        return (f"samples: {len(self._pairs)} pairs of {self.file}; `prompts` are not trained on",)

    def prepare(self, task: Task) -> None:
        self._latents.clear()

    def digest(self) -> str:
        return digest_of(self._pairs)

    def places(self, rollout: Rollout, iteration: int, groups: int) -> Places:
        return _places(groups, 2)

    def collect(self, task: Task, records: Sequence[PromptRecord], iteration: int) -> GivenSamples:
        chosen = prompts_of_iteration([pair.record for pair in self._pairs], len(records), task.seed, iteration)
        files = [path for record in chosen for path in self._pairs[record.uid].files]
        scores = torch.tensor([[1.0], [0.0]]).repeat(len(chosen), 1)
        return _given(task, iteration, chosen, files, self._latents, ("chosen",), scores)


@dataclass(frozen=True)
class FromImages:
    """Images of `file`, a .jsonl of {prompt, image} or clips of {prompt, video} (flowalign.image_sets.load_labeled): for supervised fine-tuning (advantage
    Constant, objective AdvantageWeighted), each a group of its own with the score 1 in the channel "image".

    scored: instead, a group is `rollout.group_size` images of one prompt, drawn anew each time, scored by the run's reward on
    what the VAE makes of them: offline RAFT (2304.06767, advantage Best). Draws, VAE and `prompts` as in FromPairs."""

    file: str
    scored: bool = False
    role = None
    rolled = False

    @cached_property
    def _rows(self) -> list[LabeledImage]:
        return load_labeled(self.file)

    @cached_property
    def _latents(self) -> ImageLatents:
        return ImageLatents()

    @cached_property
    def _sets(self) -> dict[int, list[LabeledImage]]:
        """What a group is drawn from, by the uid of its first row: one image, or all of a prompt."""
        if not self.scored:
            return {row.record.uid: [row] for row in self._rows}
        first: dict[object, int] = {}
        sets: dict[int, list[LabeledImage]] = {}
        for row in self._rows:
            uid = first.setdefault(request_of(row.record), row.record.uid)
            sets.setdefault(uid, []).append(row)
        return sets

    def check(self, setup: Setup) -> None:
        _check(self._rows, setup)
        size = setup.rollout.group_size
        if not self.scored and size != 1:
            raise ValueError(
                f"got rollout.group_size={size} with images that are not scored; expected 1, or scored=true to compare those of a prompt"
            )
        small = next((rows for rows in self._sets.values() if len(rows) < size), None)
        if small is not None:
            raise ValueError(
                f"{small[0].place}: got {len(small)} image(s) of this prompt; expected at least rollout.group_size={size} to compare"
            )

    def channels(self, reward: tuple[str, ...]) -> tuple[str, ...]:
        return reward if self.scored else ("image",)

    def notes(self) -> tuple[str, ...]:
        return (f"samples: {len(self._rows)} images of {self.file}; `prompts` are not trained on",)

    def prepare(self, task: Task) -> None:
        self._latents.clear()

    def digest(self) -> str:
        return digest_of(self._rows)

    def places(self, rollout: Rollout, iteration: int, groups: int) -> Places:
        return _places(groups, rollout.group_size)

    def collect(self, task: Task, records: Sequence[PromptRecord], iteration: int) -> GivenSamples:
        firsts = [rows[0].record for rows in self._sets.values()]
        chosen = prompts_of_iteration(firsts, len(records), task.seed, iteration)
        uids, files = [record.uid for record in chosen], []
        for uid, visit in zip(uids, visits(uids), strict=True):
            rows = self._sets[uid]
            order = generator(task.seed, "data", "images", iteration, uid, visit).permutation(len(rows))
            files += [rows[int(number)].image for number in order[: task.rollout.group_size]]
        scores = None if self.scored else torch.ones(len(files), 1)
        return _given(task, iteration, chosen, files, self._latents, ("image",), scores)


def _check(rows: Sequence[ImagePair | LabeledImage], setup: Setup) -> None:
    """ValueError for images that the policy cannot make, prompts that are evaluated, and settings of a rollout that is not made."""
    rollout, size = setup.rollout, setup.size
    unused = {
        "rollout.plan": rollout.plan != Deterministic() and rollout.plan,
        "rollout.sources": rollout.sources,
        "rollout.hint_key": rollout.hint_key,
        "rollout.reward_guidance": rollout.reward_guidance,
        "rollout.preview_reward": rollout.preview_reward,
        "rollout.refill": rollout.refill,
        "rollout.buckets": rollout.buckets,
        "process_rewards": setup.state_channels,
    }
    for key, value in unused.items():
        if value:
            raise ValueError(
                f"got {key}={value} with a trainer.source of files, with which nothing is rolled out; expected it left out, and "
                "rollout.plan=samplers.Deterministic"
            )
    check_images_of(rows, size.height, size.width, size.frames)
    check_not_held_out(rows, setup.held_out)


def _places(groups: int, size: int) -> Places:
    group, local = torch.arange(groups).repeat_interleave(size), torch.arange(size).repeat(groups)
    return Places(group, local, torch.zeros_like(group))  # source 0: the student


def _given(
    task: Task, iteration: int, records: Sequence[PromptRecord], files: Sequence[Place], store: ImageLatents,
    channels: tuple[str, ...], scores: Tensor | None,
) -> GivenSamples:  # fmt: skip
    """Groups of equally many files, a group for each record; scores None: those of the run's reward."""
    began, settings, uids = time.perf_counter(), task.rollout, tuple(record.uid for record in records)
    conditions = encoded(task, records, negative=task.policy.rows_per_state(settings.guidance_scale) > 1)
    places = _places(len(records), len(files) // len(records))
    here = task.processes.owners(places.group) == task.processes.rank
    own = store.of(task, [files[number] for number in here.nonzero().flatten().tolist()])
    latents = Held.of(own.to(conditions.device), here)
    seconds = {"time/encode": time.perf_counter() - began}
    valid, metrics = torch.ones(len(files), 1, dtype=torch.bool), _FREE
    if scores is None:
        scores, valid, channels, metrics = _scored(task, records, places, latents)
    visit = visits(uids)
    rows = [(uids[g], visit[g], n) for g, n in zip(places.group.tolist(), places.local.tolist(), strict=True)]
    keys = SampleKeys(task.seed, iteration, tuple(rows))
    sigmas = grid(task.policy, settings.schedule, settings.num_inference_steps, latents.values.shape[1:])
    samples = Samples(latents, places, scores, valid, channels, keys, sigmas, uids, conditions)
    return GivenSamples(samples, iteration, metrics | seconds)


def _scored(
    task: Task, records: Sequence[PromptRecord], places: Places, latents: Held
) -> tuple[Tensor, Tensor, tuple[str, ...], dict[str, float]]:
    """(scores, valid, channels, metrics) by the run's reward; each process scores whole groups, its share."""
    before, own = replace(task.counts), latents.here.nonzero().flatten()
    output = judge(task, records, places.group[own], latents.values, task.reward)
    forest = places.one_step_each()
    output = gather_output(task.processes, forest.tree, output) if task.processes.count > 1 else output
    spent = task.counts.since(before)
    decodes, calls = task.processes.total(spent.decodes), task.processes.total(spent.reward_calls)
    own_samples = torch.ones(len(output.scores), dtype=torch.bool)
    metrics = reward_metrics(task.reward.name, output, own_samples) | cost_metrics(forest, output, 0.0, decodes, calls)
    return output.scores, output.valid, output.channels, metrics
