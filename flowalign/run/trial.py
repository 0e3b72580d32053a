"""The trial of each reward before a run: that it scores what the run will give it, and what it then says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from flowalign.config import TrainConfig
from flowalign.config.reads import check_reads
from flowalign.data import PromptRecord, source_images
from flowalign.errors import ConfigError
from flowalign.models import Policy, Size
from flowalign.run.held_out_rewards import held_out_rewards
from flowalign.run.preflight import Prompts
from flowalign.run.trial_result import Trial
from flowalign.run.trial_samples import COUNT, NOISE, sample_latents, sample_pictures
from rewards import Reward, RewardBatch, RewardError, RewardOutput, channels_of, score
from rewards.guard import load
from rewards.remote.description import fingerprint

PATIENCE = 2.0  # seconds of a trial before it is said what is waited for
PROMPTS = 16  # so many are tried before a reward is said to score nothing
QUICK = 1.0  # seconds of a first call up to which a second one is timed


@dataclass(frozen=True)
class _Candidate:
    """A reward to be tried. place: where it stands in the configuration. hint: how to leave it out, for messages. guides:
    whether the rollout follows its gradient. descended: whether the trainer back-propagates it."""

    place: str
    reward: Reward
    records: Sequence[PromptRecord]
    hint: str = ""
    guides: bool = False
    descended: bool = False

    @property
    def label(self) -> str:
        return f"{self.place}{self.hint} {self.reward.name!r}"


def try_rewards(
    config: TrainConfig, prompts: Prompts, device: torch.device | str, policy: Policy | None = None, *,
    announce: bool = False,
) -> list[Trial]:  # fmt: skip
    """Each reward is loaded and scores three samples of one prompt, of the form and on the device that it gets in the run: two
    of noise and an empty one (see trial_samples). Before the model is loaded (policy None): rewards that do not read latents;
    after it: the others. announce: prints the name of a reward that takes longer than PATIENCE.

    ConfigError for a reward that
    * raises, answers in another form or in other channels than its spec says, or scores outside its range;
    * has a channel without a score for any of PROMPTS prompts spread over the set (unless spec.scores_black is False);
    * guides the run by a gradient that is not finite, or 0 on all noise;
    * is back-propagated and gives scores without a graph."""
    trials = []
    for candidate in _candidates(config, prompts):
        spec = candidate.reward.spec
        if ("latents" in spec.inputs) == (policy is None):
            continue
        with _patience(f"trying {candidate.label} …", announce):
            samples = (
                sample_pictures(config.policy.size, config.policy.fps, device)
                if policy is None
                else sample_latents(config, spec, device, policy)
            )
            trials.append(_try(candidate, samples, device))
    return trials


def try_judges(
    judges: Sequence[Reward], records: Sequence[PromptRecord], size: Size, fps: float | None,
    device: torch.device | str, *, announce: bool = False,
) -> None:  # fmt: skip
    """The same for the rewards of an evaluation without a run, other than those that read latents."""
    for reward in judges:
        check_reads("rewards", reward, size.frames, records)
        if "latents" not in reward.spec.inputs:
            candidate = _Candidate("rewards", reward, records)
            with _patience(f"trying {candidate.label} …", announce):
                _try(candidate, sample_pictures(size, fps, device), device)


def _candidates(config: TrainConfig, prompts: Prompts) -> list[_Candidate]:
    named, guidance = config.evaluation.rewards, config.rollout.reward_guidance
    guide = None if guidance is None or guidance.spsa is not None else guidance.judge(config.process_rewards)
    descended = config.trainer.forecast(config.rollout).reward_gradient
    of_rollout = [
        *(("process_rewards", reward) for reward in config.process_rewards),
        *config.guiding_rewards.items(),
    ]
    return [
        _Candidate("reward", config.reward, prompts.train, guides=config.reward is guide, descended=descended),
        *(_Candidate(place, reward, prompts.train, guides=reward is guide) for place, reward in of_rollout),
        *(_Candidate("evaluation.rewards", reward, prompts.held_out) for reward in named),
        *(
            _Candidate("evaluation.training_reward", reward, prompts.held_out, " (false leaves it out)")
            for reward in held_out_rewards(config)[len(named) :]
        ),
    ]


def _try(candidate: _Candidate, samples: dict[str, Any], device: torch.device | str) -> Trial:
    reward, began = candidate.reward, time.perf_counter()
    try:
        load(reward)
        seconds = time.perf_counter() - began
        batch, output = _first_scored(candidate, samples, device)
        if output.elapsed < QUICK:
            output = score(reward, batch, max_fail_rate=1.0)
        if candidate.guides:
            _check_gradient(candidate, batch)
        elif candidate.descended:
            _with_graph(candidate, batch)
    except RewardError as error:
        raise ConfigError(
            f"{candidate.place}{candidate.hint}: tried on noise and on an empty sample, {error}"
        ) from error
    return Trial(
        candidate.place, reward.name, channels_of(reward), output.scores.tolist(), seconds,
        1000 * output.elapsed / COUNT, reward.spec.memory, _fingerprint(reward),
    )  # fmt: skip


def _first_scored(
    candidate: _Candidate, samples: dict[str, Any], device: torch.device | str
) -> tuple[RewardBatch, RewardOutput]:
    """The samples with the first prompt after which every channel has given a score, and their scores."""
    reward, records = candidate.reward, _spread(candidate.records)
    channels, reason = channels_of(reward), ""
    scored = torch.zeros(len(channels), dtype=torch.bool)
    for record in records:
        # one prompt for all three: where their scores differ, the reward has looked at the samples
        batch = RewardBatch(
            prompts=[record.prompt] * COUNT,
            metadata=[record.metadata] * COUNT,
            conditions=source_images([record] * COUNT, device),
            group_ids=[0] * COUNT,
            **samples,
        )
        output = score(reward, batch, max_fail_rate=1.0)
        scored |= output.valid.any(0)
        reason = reason or next((text for text in output.info if text), "")
        if bool(scored.all()) or not reward.spec.scores_black:
            return batch, output
    without = [channel for channel, any_score in zip(channels, scored.tolist(), strict=True) if not any_score]
    where = f" in {', '.join(without)}" if len(channels) > 1 else ""
    raise ConfigError(
        f"got {candidate.label}, which scores neither noise nor an empty sample{where}, with none of {len(records)} prompts such "
        f"as {records[0].prompt!r}: {reason or 'it gives no reason'}; expected at least one score: take a reward that fits the "
        "prompts, or set `scores_black=False` in its spec if only finished pictures can have a score"
    )


def _spread(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The first prompt, then others at equal distances; PROMPTS at most."""
    return [records[start] for start in dict.fromkeys(len(records) * number // PROMPTS for number in range(PROMPTS))]


def _with_graph(candidate: _Candidate, batch: RewardBatch) -> tuple[dict[str, torch.Tensor], RewardOutput]:
    """What the reward reads, by name, and its scores with their graph to it. RewardError for scores without one."""
    read = candidate.reward.spec.inputs
    leaves: dict[str, Any] = {name: batch.tensors()[name].detach().clone().requires_grad_() for name in read}
    return leaves, score(candidate.reward, replace(batch, **leaves), grad=True, max_fail_rate=1.0)


def _check_gradient(candidate: _Candidate, batch: RewardBatch) -> None:
    """ConfigError if the gradient to what the reward reads is not finite, or 0 on all the noise that has a score."""
    leaves, output = _with_graph(candidate, batch)
    if not bool(output.valid[:NOISE].any()):
        return
    total = torch.where(output.valid, output.scores, 0).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    if finite and any(bool((gradient[:NOISE] != 0).any()) for gradient in gradients):
        return
    raise ConfigError(
        f"got {candidate.label}, by whose gradient the run is guided, with a gradient that is "
        f"{'0 on noise' if finite else 'not finite'}; expected finite numbers other than 0: mend the reward (rounding, clamping "
        "and thresholds have none), take another, or set rollout.reward_guidance.spsa={} (an estimate from its scores)"
    )


def _fingerprint(reward: Reward) -> str:
    try:
        return fingerprint(reward)
    except ValueError:  # it holds what JSON cannot say: a function, a network
        return "-"


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
