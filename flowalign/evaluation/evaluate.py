"""Evaluation: images of the deterministic sampler on fixed prompts and seeds, and their scores.

The initial noise is a function of (seed, prompt uid, sample) alone: base and tuned model start from the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.data import PromptRecord, digest, source_images
from flowalign.distributed.processes import Processes
from flowalign.models.base import Conditions, Policy, Size
from flowalign.models.grid import grid
from rewards import Reward, RewardBatch, RewardError, labels_of, pictures, score
from samplers import Schedule, Tree, normal, rollout, scattered


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Scores and images of one evaluation. N images, sample-major: every prompt's first sample, then every second one, …

    scores {reward: float64 [N]}, nan where the reward was not valid; images [k, 3, H, W] in [0, 1], the first k;
    digest: of the prompts with their metadata (`flowalign.data.digest`)."""

    uids: list[int]
    prompts: list[str]
    scores: dict[str, Tensor]
    images: Tensor
    seed: int
    num_inference_steps: int
    guidance_scale: float
    evaluations_per_image: float
    seconds: float
    digest: str = ""


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[PromptRecord],
    rewards: Sequence[Reward],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    size: Size,
    samples_per_prompt: int = 1,
    schedule: Schedule | None = None,
    keep_images: int = 8,
    fps: float | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> EvaluationResult:
    """Generates every prompt `samples_per_prompt` times by its solver (never with SDE noise) and scores the images.

    schedule: the noise levels; None: the family's own grid. Uses the weights as they are: wrap the call in
    `policy.role("reference")` for the base, in `ema.applied()` for the average. Scores do not depend on `batch_size` beyond
    rounding. `progress(n)` is called after each batch of n. fps: of a policy that makes videos, of which the result keeps
    the first frames. A reward of several channels is reported as several, `reward/channel`. A reward that fails, or gives
    no score for more than half of the images, is a RewardError; one sample without a
    score is nan. `processes` share the images, and each returns the whole result."""
    _check(prompts, rewards, batch_size, samples_per_prompt)
    everyone = processes or Processes()
    began, rows_before = time.monotonic(), policy.evaluations
    jobs = [(record, number) for number in range(samples_per_prompt) for record in prompts]
    if len(jobs) < everyone.count:
        raise ValueError(
            f"got {len(jobs)} images for {everyone.count} processes; expected at least one for each: add prompts or samples"
        )
    share = everyone.share(len(jobs))
    shape = policy.latent_shape(size)
    kept: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {label: [] for reward in rewards for label in labels_of(reward)}
    for first in range(share.start, share.stop, batch_size):
        batch = jobs[first : min(first + batch_size, share.stop)]
        noise = torch.stack([normal(shape, seed, "start", "evaluate", record.uid, number) for record, number in batch])
        conditions = policy.encode([record for record, _ in batch], negative=guidance_scale != 1)
        latents = sample(policy, conditions, noise, num_inference_steps, guidance_scale, schedule)
        images = policy.decode(latents)
        for name, part in _score(rewards, [record for record, _ in batch], images, latents, fps, first).items():
            scores[name].append(part)
        still = images if images.ndim == 4 else images[:, 0]
        kept.append(still[: max(0, keep_images - first)].float().cpu())
        if progress is not None:
            progress(len(batch))
    complete = {name: everyone.gather(torch.cat(parts)) for name, parts in scores.items()}
    _check_valid(complete)
    return EvaluationResult(
        uids=[record.uid for record, _ in jobs],
        prompts=[record.prompt for record, _ in jobs],
        scores=complete,
        images=everyone.gather(torch.cat(kept)),
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        evaluations_per_image=everyone.total(policy.evaluations - rows_before) / len(jobs),
        seconds=time.monotonic() - began,
        digest=digest(prompts),
    )


def _check(prompts: Sequence[PromptRecord], rewards: Sequence[Reward], batch_size: int, samples: int) -> None:
    names, uids = [label for reward in rewards for label in labels_of(reward)], [record.uid for record in prompts]
    if not prompts or not rewards or batch_size < 1 or samples < 1:
        raise ValueError(
            f"evaluate got {len(prompts)} prompts, {len(rewards)} rewards, batch_size={batch_size}, "
            f"samples_per_prompt={samples}; expected at least 1 of each"
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"got rewards {names}; expected different names, or scores would overwrite each other: give each its own `name`"
        )
    if len(set(uids)) < len(uids):
        raise ValueError("got two prompts with one uid, hence the same noise; use samples_per_prompt to repeat prompts")


@torch.no_grad()
def sample(
    policy: Policy,
    conditions: Conditions,
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    schedule: Schedule | None = None,
) -> Tensor:
    """Clean latents [n, *] by the deterministic sampler (the solver of the policy's scheduler), from unit noise [n, *]."""
    tree = scattered(num_inference_steps, len(noise), (), shared_start=False)  # no step has noise

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance_scale)

    sigmas = grid(policy, schedule, num_inference_steps, noise.shape[1:])
    forest = rollout(velocity, policy.start(noise), sigmas, tree, policy.solver(), _no_noise)
    return forest.at(tree.leaves)


def _score(
    rewards: Sequence[Reward],
    records: list[PromptRecord],
    images: Tensor,
    latents: Tensor,
    fps: float | None,
    first: int,
) -> dict[str, Tensor]:
    """{reward: float64 [n]}, a reward of several channels as `reward/channel`; nan = not valid. How many may fail is judged
    over all images, not batch by batch."""
    batch = RewardBatch(
        prompts=[record.prompt for record in records],
        metadata=[record.metadata for record in records],
        sample_ids=list(range(first, first + len(records))),
        group_ids=[record.uid for record in records],
        conditions=source_images(records, latents.device),
        latents=latents,
        sigma=latents.new_zeros(len(latents)),
        **pictures(images, fps),
    )
    outputs = [(reward, score(reward, batch, max_fail_rate=1.0)) for reward in rewards]
    return {
        label: column.double()
        for reward, output in outputs
        for label, column in zip(labels_of(reward), output.scores.T, strict=True)
    }


def _check_valid(scores: dict[str, Tensor]) -> None:
    for name, values in scores.items():
        failed = int(values.isnan().sum())
        if 2 * failed > len(values):
            raise RewardError(
                f"reward {name!r} could not score {failed} of {len(values)} images; expected at most half: mend it, then "
                "evaluate"
            )


def _no_noise(tree: Tree, nodes: Tensor) -> Tensor:
    raise AssertionError("a deterministic rollout asked for noise")
