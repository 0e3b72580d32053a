"""The hours of a whole run, from a few timings and the counts of the forecast."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.forecast.counts import RunCounts


@dataclass(frozen=True)
class Timing:
    """Seconds of one device: per network row of a rollout, per decoded image, per image given to the reward, and per image of an
    iteration in its updates."""

    row: float
    decode: float
    reward: float
    update: float


def device_seconds(counts: RunCounts, timing: Timing) -> dict[str, float]:
    """Seconds of one device for the whole run, by what they are spent on. An evaluation's images are decoded and scored once; its own
    rewards are taken to be as fast as the one that is trained on."""
    scored = counts.before_scored + counts.iterations * counts.decodes
    return {
        "rollout": (counts.before + counts.iterations * counts.sampled) * timing.row + scored * timing.decode,
        "reward": scored * timing.reward,
        "update": counts.iterations * counts.images * timing.update,
        "evaluation": counts.evaluation_rows * timing.row + counts.evaluated * (timing.decode + timing.reward),
    }
