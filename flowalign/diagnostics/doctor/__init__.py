"""`flowalign doctor`: measures whether a configuration can train, before hours are spent on it.

Two prompts are rolled out as the configuration says, and one optimizer step is taken on a policy that is thrown away.
Except where the reward itself is checked, brightness takes its place, so that gradients are judged apart from the reward.
Not checked: several processes, evaluation, checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig, load_config
from flowalign.data import PromptRecord, load_prompts
from flowalign.diagnostics.device import elapsed, mark
from flowalign.diagnostics.doctor.base import Finding, guarded
from flowalign.diagnostics.doctor.cost import check_cost, check_memory, check_reward, check_time, fixture
from flowalign.diagnostics.doctor.guards import check_clip, check_distilled, check_grid, check_guidance, check_noise
from flowalign.diagnostics.doctor.network import (
    check_adapters,
    check_conditions,
    check_modes,
    check_parity,
    check_roles,
    check_velocity,
)
from flowalign.diagnostics.doctor.objective import check_anchors, check_canonical
from flowalign.diagnostics.doctor.update import (
    check_dtypes,
    check_floor,
    check_gradient,
    check_merged,
    check_reached,
    check_replay,
)
from flowalign.diagnostics.measure import StandIn, count_calls, gradients
from flowalign.models import Policy
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.rolling import leaves_per_group
from flowalign.rollouts.task import Task
from rewards import channels_of, close, score

__all__ = ["Finding", "diagnose", "examine"]

Result = TypeVar("Result")


def diagnose(paths: str | Sequence[str], overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """All findings of a configuration (see `load_config`), one by one."""
    configs: list[TrainConfig] = []
    policies: list[Policy] = []

    def read() -> Finding:
        configs.append(load_config(paths, overrides)[0])
        rollout = configs[0].rollout
        distinct_prompts(configs[0], prompt_count(configs[0]))
        images = leaves_per_group(rollout)[0]
        figure = f"{rollout.groups} prompts × {images} images × {rollout.num_inference_steps} steps"
        return Finding("configuration", True, f"{configs[0].run.name}: {figure}")

    def fit() -> Finding:
        return check_memory(configs[0], torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def load() -> Finding:
        began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
        policies.append(policy_of(configs[0], device))
        return Finding("model", True, f"{configs[0].policy.path} on {device}, {time.perf_counter() - began:.1f} s")

    failed: set[str] = set()
    yield guarded("configuration", read, failed)
    yield guarded("memory", fit, failed, ("configuration",))
    yield guarded("model", load, failed, ("configuration", "memory"))
    if not failed:
        yield from examine(configs[0], policies[0])


def examine(config: TrainConfig, policy: Policy) -> Iterator[Finding]:
    """The findings about a policy, of which the weights are changed by one optimizer step."""
    settings, trainer, failed = config.policy, config.trainer, set[str]()
    prompts = distinct_prompts(config, prompt_count(config))
    real = task_of(config, policy, groups=len(prompts))
    # without prompts a trainer leaves out what comes before its first iteration
    size = real.size_of(prompts)
    videos = len(policy.latent_shape(size)) == 4
    task = replace(real, reward=StandIn(channels_of(config.reward), videos=videos), prompts=(), size=size)
    inspection = trainer.forecast(task.rollout).inspection

    @cache
    def first() -> tuple[Any, int]:
        trainer.prepare(task, None)
        return _counted(policy, lambda: trainer.collect(prompts, 0))

    @cache
    def own() -> tuple[ScoredRollout, int]:
        return _counted(policy, lambda: collect(task, prompts, 0))

    # the batch of a trainer that replays no steps need not have a tree: the doctor then rolls out for itself
    rolled = own if inspection.replay is None else first

    @cache
    def gradient() -> tuple[dict[str, Tensor], int]:
        batch = first()[0]
        return _counted(policy, lambda: gradients(policy, trainer, batch))

    @cache
    def moved() -> tuple[Any, dict[str, Tensor], float]:
        for optimizer in trainer.optimizers.values():
            optimizer.step()
        batch, began = trainer.collect(prompts, 0), mark()
        return batch, gradients(policy, trainer, batch), elapsed(began, mark()) / batch.images

    def after() -> ScoredRollout:
        return rolled()[0] if rolled is own else moved()[0]

    def ask(name: str, check: Callable[[], Finding], *needs: str) -> Finding:
        return guarded(name, check, failed, needs)

    yield ask("distilled", partial(check_distilled, config))
    yield ask("guidance", partial(check_guidance, config, task))
    yield ask("grid", partial(check_grid, config, task))
    yield ask("noise", partial(check_noise, task))
    yield ask("clip range", partial(check_clip, task, inspection.clip))
    yield ask("adapters", partial(check_adapters, policy, settings))
    yield ask("modes", partial(check_modes, policy))
    yield ask("parity", partial(check_parity, task, settings, prompts), "modes")
    yield ask("conditions", partial(check_conditions, task, settings, prompts), "modes")
    yield ask("velocity", partial(check_velocity, task, settings, prompts), "modes")
    yield ask("roles", partial(check_roles, task, settings, prompts), "adapters", "velocity")
    yield ask("dtypes", lambda: check_dtypes(task, rolled()[0]), "roles")
    yield ask("replay", lambda: check_replay(task, settings, inspection.replay, rolled()[0]), "dtypes")
    yield ask("floor", lambda: check_floor(task, inspection.replay, rolled()[0]), "dtypes")
    yield ask("canonical", lambda: check_canonical(inspection.endpoints, lambda: first()[0]), "dtypes")
    yield ask("anchors", lambda: check_anchors(inspection.pulls, lambda: first()[0]), "dtypes")
    yield ask("gradient", lambda: check_gradient(task, gradient()[0]), "replay", "floor")
    yield ask("cost", lambda: check_cost(task, trainer, rolled()[0], rolled()[1], first(), gradient()[1]), "gradient")
    yield ask("reached", lambda: check_reached(task, rolled()[0], moved()[1]), "gradient")
    yield ask("merged", lambda: check_merged(task, settings, inspection.edges, after), "gradient")
    try:
        yield from _rewards(config, task, prompts, lambda: rolled()[0], ask)
        rewarded = f"reward {config.reward.name}"
        yield ask("time", lambda: _time(config, task, after(), moved()[2], prompts), "reached", rewarded)
    finally:
        for reward in (*config.rollout_rewards, *config.evaluation.rewards):
            close(reward)


def _rewards(
    config: TrainConfig, task: Task, prompts: Sequence[PromptRecord], batch: Callable[[], ScoredRollout],
    ask: Callable[..., Finding],
) -> Iterator[Finding]:  # fmt: skip
    """The reward that is trained on, and those of the evaluation (on held-out prompts: only the form of the answer)."""
    held_out = load_prompts(config.evaluation.prompts)[: len(prompts)]
    held_out = held_out * (len(prompts) // len(held_out) + 1)
    for reward, trained in [(config.reward, True), *((reward, False) for reward in config.evaluation.rewards)]:
        records = prompts if trained else held_out
        yield ask(
            f"{'reward' if trained else 'evaluation'} {reward.name}",
            lambda reward=reward, records=records, trained=trained: check_reward(
                reward, fixture(task, batch(), records, reward), trained=trained
            ),
            "dtypes",
        )


def _time(
    config: TrainConfig, task: Task, batch: ScoredRollout, update: float, prompts: Sequence[PromptRecord]
) -> Finding:
    images = fixture(task, batch, prompts, config.reward)
    images = images.select(range(min(16, len(images))))
    began = mark()
    score(config.reward, images)
    return check_time(config, batch, update, elapsed(began, mark()) / len(images))


def _counted(policy: Policy, work: Callable[[], Result]) -> tuple[Result, int]:
    """What `work` returns, and the network rows that it took, without those that only filled up a call."""
    padded = policy.padded
    with count_calls(policy) as calls:
        result = work()
    return result, sum(call.rows for call in calls) - (policy.padded - padded)


def prompt_count(config: TrainConfig) -> int:
    """How many prompts the doctor rolls out: two, or as many as the optimizer steps of one iteration need."""
    return max(2, config.trainer.forecast(config.rollout).updates)


def distinct_prompts(config: TrainConfig, count: int) -> list[PromptRecord]:
    """The first `count` training prompts of different text, of the largest bucket; ValueError if there are fewer."""
    found: dict[str, PromptRecord] = {}
    for record in config.largest_prompts():
        if len(found) < count:
            found.setdefault(record.prompt, record)
    if len(found) < count:
        raise ValueError(
            f"got {len(found)} different prompts in {config.prompts}; expected {count}, which the doctor compares: add some"
        )
    return list(found.values())
