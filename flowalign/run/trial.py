"""The trial of each reward before a run: that it scores what the run will give it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flowalign.config import TrainConfig
from flowalign.data import PromptRecord, source_images
from flowalign.errors import ConfigError
from flowalign.models import Policy
from flowalign.run.held_out_rewards import held_out_rewards
from flowalign.run.preflight import Prompts
from rewards import Reward, RewardBatch, RewardError, channels_of, pictures, score

PATIENCE = 2.0  # seconds of a trial before it is said what is waited for
PAIRS = 8  # so many times two prompts are tried before a reward is said to score nothing


def try_rewards(
    config: TrainConfig, prompts: Prompts, device: torch.device | str, policy: Policy | None = None, *,
    announce: bool = False,
) -> None:  # fmt: skip
    """Each reward scores two samples of the form and on the device that it gets in the run: before the model is loaded
    (policy None) those that read images or videos only, two black ones; after it those that read latents too, two all-zero
    latents and what the policy decodes from them. announce: prints the name of a reward that takes longer than PATIENCE.

    ConfigError for one that cannot: a name is misspelt, a shape is wrong, it answers in other channels than its spec says, or
    in a channel it has no score for any of 2 · PAIRS prompts spread over the set (unless its spec says that black images have
    none)."""
    judges, named = held_out_rewards(config), len(config.evaluation.rewards)
    trials = [
        ("reward", config.reward, prompts.train),
        *(("process_rewards", reward, prompts.train) for reward in config.process_rewards),
        *((key, reward, prompts.train) for key, reward in config.guiding_rewards.items()),
        *(("evaluation.rewards", reward, prompts.held_out) for reward in judges[:named]),
        *(("evaluation.training_reward (false leaves it out)", reward, prompts.held_out) for reward in judges[named:]),
    ]
    for place, reward, records in trials:
        if ("latents" in reward.spec.inputs) == (policy is None):
            continue
        with _patience(f"trying {place} {reward.name!r} …", announce):
            _try(config, place, reward, records, device, policy)


def _try(
    config: TrainConfig, place: str, reward: Reward, records: Sequence[PromptRecord], device: torch.device | str,
    policy: Policy | None,
) -> None:  # fmt: skip
    what = "black images" if policy is None else "all-zero latents"
    fields = _black(config, device) if policy is None else _zero_latents(config, reward, device, policy)
    channels, reason = channels_of(reward), ""
    scored, pairs = torch.zeros(len(channels), dtype=torch.bool), _pairs(records)
    for two in pairs:
        batch = RewardBatch(
            prompts=[record.prompt for record in two],
            metadata=[record.metadata for record in two],
            conditions=source_images(two, device),
            **fields,
        )
        try:
            output = score(reward, batch, max_fail_rate=1.0)
        except RewardError as error:
            raise ConfigError(f"{place}: tried on two {what}, {error}") from error
        scored |= output.valid.any(0)
        reason = reason or next((text for text in output.info if text), "")
        if bool(scored.all()) or not reward.spec.scores_black:
            return
    without = [channel for channel, any_score in zip(channels, scored.tolist(), strict=True) if not any_score]
    where = f" in {', '.join(without)}" if len(channels) > 1 else ""
    raise ConfigError(
        f"got {place} {reward.name!r}, which scores none of {2 * len(pairs)} {what}{where}, of prompts such as "
        f"{records[0].prompt!r}: {reason or 'it gives no reason'}; expected at least one score: take a reward that fits the "
        "prompts, or set `scores_black=False` in its spec if only finished pictures can have a score"
    )


def _pairs(records: Sequence[PromptRecord]) -> list[list[PromptRecord]]:
    """The first two prompts, then further pairs at equal distances; PAIRS at most. A single prompt is its own pair."""
    starts = [len(records) * number // PAIRS for number in range(PAIRS)]
    first = dict.fromkeys(min(start, max(len(records) - 2, 0)) for start in starts)
    return [(list(records[start : start + 2]) * 2)[:2] for start in first]


@contextmanager
def _patience(text: str, announce: bool) -> Iterator[None]:
    """Prints `text` if what is inside takes longer than PATIENCE seconds."""
    timer = threading.Timer(PATIENCE, print, [text], {"flush": True})
    timer.daemon = True
    if announce:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _black(config: TrainConfig, device: torch.device | str) -> dict[str, Any]:
    """Two black images, or videos of a policy that makes more than one frame."""
    size = config.policy.size
    frames = (size.frames,) if size.frames > 1 else ()
    return pictures(torch.zeros(2, *frames, 3, size.height, size.width, device=device), config.policy.fps)


def _zero_latents(config: TrainConfig, reward: Reward, device: torch.device | str, policy: Policy) -> dict[str, Any]:
    """Two all-zero latents, pure noise for a process reward, else data, decoded if the reward reads that too."""
    latents = torch.zeros(2, *policy.latent_shape(config.policy.size), device=device)
    sigma = torch.full((2,), float(reward.spec.scope == "latent"), device=device)
    decoded = set(reward.spec.inputs) != {"latents"}
    made = pictures(policy.decode(latents), config.policy.fps) if decoded else {}
    return {"latents": latents, "sigma": sigma, **made}
