"""Metrics of one rollout: rewards, costs per image, process rewards. docs/methods.md explains each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowalign.rollouts.previews import correlation
from rewards import Reward, RewardOutput, channels_of
from samplers import SOURCES, Forest, sampled


def own_samples(forest: Forest) -> Tensor:
    """[L] bool: the leaves that end one of the policy's own samples."""
    return sampled(forest.tree) & (forest.tree.source[forest.tree.leaves] == SOURCES.index("student"))


def reward_metrics(name: str, output: RewardOutput, own: Tensor) -> dict[str, float]:
    """Of the policy's `own` [L] samples: probes of noisier states would lower the mean, a teacher's samples raise it. `invalid`
    is of all.

    reward/mean: of several channels the mean of their means, whatever weight an advantage gives them."""
    found: dict[str, float] = {}
    for channel, column in zip(output.channels, output.scores.T, strict=True):
        ok = column[column.isfinite() & own].double()
        found[f"reward/{channel}_mean"] = _mean(column[own])
        found[f"reward/{channel}_std"] = float(ok.std(unbiased=False)) if len(ok) else float("nan")
    means = [found[f"reward/{channel}_mean"] for channel in output.channels]
    return {
        "reward/mean": sum(means) / len(means),
        **found,
        "reward/invalid": float((~output.valid).any(1).sum()),
        **{f"reward/{name}.{part}_mean": _mean(values[own]) for part, values in output.components.items()},
    }


def cost_metrics(forest: Forest, output: RewardOutput, rows: float, decodes: float, calls: float) -> dict[str, float]:
    """Per image. rows, decodes, calls: of the network, the decoder and rewards, over all processes."""
    sample = sampled(forest.tree)
    images, probes = int(sample.sum()), int((~sample).sum())
    found = {"cost/rollout_per_image": rows / images}
    if probes:
        found["cost/probes_per_image"] = probes / images
    if forest.previews:
        found["cost/previews_per_image"] = forest.previews / images
        found["reward/preview_correlation"] = correlation(forest, output.scores[:, 0], output.valid[:, 0])
    return {**found, "cost/decodes_per_image": decodes / images, "cost/reward_calls_per_image": calls / images}


def process_metrics(rewards: Sequence[Reward], forest: Forest) -> dict[str, float]:
    """Of the states that process rewards scored."""
    channels = [channel for reward in rewards for channel in channels_of(reward)]
    return {f"process/{name}_mean": _mean(forest.scores[name]) for name in channels}


def _mean(values: Tensor) -> float:
    """Over the finite ones; nan without one."""
    finite = values[values.isfinite()].double()
    return float(finite.mean()) if len(finite) else float("nan")
