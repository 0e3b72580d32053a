"""Whether each reward reads what the policy makes, and what its prompts hold, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from flowalign.config.settings import TrainConfig
from flowalign.data import PromptRecord
from flowalign.errors import ConfigError
from rewards import Reward, spec_of


def check_rewards_read(config: TrainConfig, prompts: Sequence[PromptRecord], held_out: Sequence[PromptRecord]) -> None:
    """ConfigError for a reward of the configuration that would get no batch of the form that it reads."""
    frames, evaluation = config.policy.frames, config.evaluation
    preview = config.rollout.preview_reward
    for key, reward, records in (
        ("reward", config.reward, prompts),
        *([] if preview is None else [("rollout.preview_reward", preview, prompts)]),
        *(("process_rewards", each, prompts) for each in config.process_rewards),
        *(("evaluation.rewards", each, held_out) for each in evaluation.rewards),
        *([("evaluation.training_reward", config.reward, held_out)] if evaluation.training_reward else []),
    ):
        check_reads(key, reward, frames, records)


def check_reads(key: str, reward: Reward, frames: int, records: Sequence[PromptRecord]) -> None:
    """ConfigError for a reward of videos where the policy makes images (frames 1), of images where it makes videos, and of edits
    where a prompt has no source image. key: where the reward stands, for messages."""
    inputs, got = spec_of(reward).inputs, f"got {key} {reward.name!r}"
    if "videos" in inputs and frames == 1:
        raise ConfigError(
            f"{got}, which reads videos, with policy.frames=1, which makes images; expected a reward of images, or a model layer of "
            "videos (docs/recipes.md has pairs)"
        )
    if "images" in inputs and frames > 1:
        raise ConfigError(
            f"{got}, which reads images, with policy.frames={frames}, which makes videos; expected a reward of videos: take one, or "
            "wrap it in rewards.OnFrames"
        )
    alone = next((record.prompt for record in records if not record.images), None)
    if "conditions" in inputs and alone is not None:
        raise ConfigError(
            f"{got}, which compares with a source image, and the prompt {alone!r} without one; expected a model of edits and prompts "
            "with an 'image' (docs/recipes.md has pairs)"
        )
