"""Evaluation: images of the deterministic sampler on fixed prompts and seeds, their scores, and the gain of a pair.

Base and tuned model start from the same noise, which is a function of (seed, prompt uid, sample) alone, so their
difference is paired: most of the spread between prompts cancels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.data import PromptRecord, digest
from flowalign.files import append_line
from flowalign.models.base import Policy, encode_singly
from flowalign.processes import Processes
from rewards import Reward, RewardBatch, RewardError, score
from samplers import ODE, Tree, chain, rollout
from samplers.noise import generator, normal


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What an evaluation saw. N images, sample-major: every prompt's first sample, then every prompt's second, …

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


@dataclass(frozen=True)
class Gain:
    """tuned − base: `base`, `tuned` and `mean` (their difference) over the valid pairs, a 95 % interval low … high.

    The interval is None with fewer than two prompts. `pairs` were compared, `dropped` had an invalid score."""

    mean: float
    interval: tuple[float, float] | None
    base: float
    tuned: float
    pairs: int
    dropped: int


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
    height: int,
    width: int,
    samples_per_prompt: int = 1,
    keep_images: int = 8,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> EvaluationResult:
    """Generates every prompt `samples_per_prompt` times by the ODE (never with SDE noise) and scores the images.

    Uses the weights as they are: wrap the call in `policy.role("reference")` for the base, in `ema.applied()` for the
    average. Scores do not depend on `batch_size` beyond rounding. `progress(n)` is called after each batch of n.
    A reward that fails, or gives no score for more than half of the images, is a RewardError; one sample without a
    score is nan. `processes` share the images, and each returns the whole result."""
    _check(prompts, rewards, batch_size, samples_per_prompt)
    everyone = processes or Processes()
    began, rows_before = time.monotonic(), policy.evaluations
    jobs = [(record, sample) for sample in range(samples_per_prompt) for record in prompts]
    if len(jobs) < everyone.count:
        raise ValueError(f"{len(jobs)} images came for {everyone.count} processes; expected at least one for each")
    share = everyone.share(len(jobs))
    shape = policy.latent_shape(height, width)
    kept: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}
    for first in range(share.start, share.stop, batch_size):
        batch = jobs[first : min(first + batch_size, share.stop)]
        noise = torch.stack([normal(shape, seed, "start", "evaluate", record.uid, sample) for record, sample in batch])
        images = _generate(policy, [record.prompt for record, _ in batch], noise, num_inference_steps, guidance_scale)
        for name, part in _score(rewards, [record for record, _ in batch], images, first).items():
            scores[name].append(part)
        kept.append(images[: max(0, keep_images - first)].float().cpu())
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
    names, uids = [reward.name for reward in rewards], [record.uid for record in prompts]
    if not prompts or not rewards or batch_size < 1 or samples < 1:
        raise ValueError(
            f"evaluate got {len(prompts)} prompts, {len(rewards)} rewards, batch_size={batch_size}, "
            f"samples_per_prompt={samples}; expected at least 1 of each"
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"rewards {names} share a name; give each its own `name`, or scores would overwrite each other"
        )
    if len(set(uids)) < len(uids):
        raise ValueError("two prompts share a uid and so their noise; use samples_per_prompt to repeat prompts")


def _generate(policy: Policy, prompts: list[str], noise: Tensor, num_inference_steps: int, guidance: float) -> Tensor:
    conditions, ode = encode_singly(policy, prompts), ODE().on(policy.path)
    one = chain(num_inference_steps, 1)
    tree = Tree.cat([replace(one, level=torch.zeros_like(one.level))] * len(prompts))  # no step has noise: no edges

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance)

    forest = rollout(
        velocity, policy.start(noise), policy.sigmas(num_inference_steps, noise.shape[1:]), tree, ode, _no_noise
    )
    leaves = tree.leaves[tree.root[tree.leaves].argsort()]
    return policy.decode(forest.at(leaves))


def _score(rewards: Sequence[Reward], records: list[PromptRecord], images: Tensor, first: int) -> dict[str, Tensor]:
    """{reward: float64 [n]}, nan = not valid. How many may fail is judged over the whole set, not batch by batch."""
    batch = RewardBatch(
        prompts=[record.prompt for record in records],
        images=images,
        metadata=[record.metadata for record in records],
        sample_ids=list(range(first, first + len(records))),
        group_ids=[record.uid for record in records],
    )
    return {reward.name: score(reward, batch, max_fail_rate=1.0).scores.double() for reward in rewards}


def _check_valid(scores: dict[str, Tensor]) -> None:
    for name, values in scores.items():
        failed = int(values.isnan().sum())
        if 2 * failed > len(values):
            raise RewardError(
                f"reward {name!r} could not score {failed} of {len(values)} images; mend it, then evaluate"
            )


def _no_noise(tree: Tree, nodes: Tensor) -> Tensor:
    raise AssertionError("a deterministic rollout asked for noise")


# ------------------------------------------------------------------------------------------ comparison


def paired_gain(
    base: Tensor, tuned: Tensor, clusters: Sequence[int] | None = None, *, seed: int = 0, resamples: int = 10_000
) -> Gain:
    """The mean of tuned − base [N] and its 95 % percentile-bootstrap interval (Efron 1979).

    What is drawn with replacement are clusters (prompt uids), not samples: several seeds of one prompt are not
    independent. Without `clusters` each sample is its own. A pair with a nan on either side is dropped and counted.
    Below about 20 clusters the interval is too narrow. The draws are keyed: the same scores give the same interval."""
    if base.shape != tuned.shape or base.ndim != 1:
        raise ValueError(f"scores of shapes {list(base.shape)} and {list(tuned.shape)}; expected two [N] of equal N")
    labels = np.arange(len(base)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(base):
        raise ValueError(f"{len(labels)} cluster labels for {len(base)} scores; expected one each")
    before, after = base.double().numpy(), tuned.double().numpy()
    valid = ~(np.isnan(before) | np.isnan(after))
    if not valid.any():
        raise ValueError(
            f"none of {len(base)} pairs has two valid scores: there is nothing to compare; check the reward"
        )
    before, after, labels = before[valid], after[valid], labels[valid]
    _, codes = np.unique(labels, return_inverse=True)
    draws = _bootstrap_means(np.bincount(codes, after - before), np.bincount(codes), seed, resamples)
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    mean_before, mean_after = float(before.mean()), float(after.mean())
    return Gain(
        mean=mean_after - mean_before,
        interval=(low, high) if codes.max() > 0 else None,
        base=mean_before,
        tuned=mean_after,
        pairs=len(before),
        dropped=int((~valid).sum()),
    )


def _bootstrap_means(sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws of as many clusters as there are; sums and counts [C] per cluster."""
    rng = generator(seed, "select", "paired_gain")
    clusters = len(sums)
    means = []
    for first in range(0, resamples, 500):  # in pieces: a piece holds 500·C numbers
        times = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(500, resamples - first))
        means.append(times @ sums / (times @ counts))
    return np.concatenate(means)


def compare(base: EvaluationResult, tuned: EvaluationResult) -> dict[str, Gain]:
    """The gain per reward. Raises ValueError unless both saw the same prompts, samples, seed and rewards."""
    for what, here, there in (
        ("prompts", base.uids, tuned.uids),
        ("seed", base.seed, tuned.seed),
        ("rewards", sorted(base.scores), sorted(tuned.scores)),
    ):
        if here != there:
            raise ValueError(f"base and tuned differ in {what} ({here} and {there}): evaluate both alike to pair them")
    return {name: paired_gain(base.scores[name], tuned.scores[name], base.uids) for name in base.scores}


def summary(gains: dict[str, Gain]) -> dict[str, dict[str, Any]]:
    """The gains as JSON for summary.json: {base, tuned, gain, gain_ci95, pairs, dropped}, each {reward: value}."""
    return {
        "base": {name: gain.base for name, gain in gains.items()},
        "tuned": {name: gain.tuned for name, gain in gains.items()},
        "gain": {name: gain.mean for name, gain in gains.items()},
        "gain_ci95": {name: list(gain.interval) if gain.interval else None for name, gain in gains.items()},
        "pairs": {name: gain.pairs for name, gain in gains.items()},
        "dropped": {name: gain.dropped for name, gain in gains.items()},
    }


def captions(base: EvaluationResult, tuned: EvaluationResult) -> list[str]:
    """A caption for each kept image pair: the prompt, then a line `reward base → tuned` per reward."""
    return [
        "\n".join(
            [
                prompt,
                *(f"{name} {_text(base.scores[name][i])} → {_text(tuned.scores[name][i])}" for name in base.scores),
            ]
        )
        for i, prompt in enumerate(base.prompts[: len(base.images)])
    ]


def _text(value: Tensor) -> str:
    return "not valid" if bool(value.isnan()) else f"{float(value):.3g}"


def append_result(path: Path, step: int, label: str, result: EvaluationResult) -> None:
    """Appends one evaluation, every score with its prompt uid, to a JSON-lines file; null = not valid.

    The rows are those of `flowalign.metrics` (`read_rows`; `MetricsLog(path).cut_back` when a run resumes)."""
    row = {
        "step": step,
        "label": label,
        "seed": result.seed,
        "num_inference_steps": result.num_inference_steps,
        "guidance_scale": result.guidance_scale,
        "evaluations_per_image": result.evaluations_per_image,
        "time/seconds": round(result.seconds, 3),
        "uids": result.uids,
        "scores": {name: [None if s != s else s for s in scores.tolist()] for name, scores in result.scores.items()},
    }
    append_line(path, json.dumps(row, allow_nan=False))
