"""Checks of rewards, counted cost, forecast memory and hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flowalign.config import TrainConfig
from flowalign.data import PromptRecord
from flowalign.diagnostics.doctor.base import Finding
from flowalign.errors import ConfigError
from flowalign.forecast.counts import RunCounts
from flowalign.forecast.hours import Timing, device_seconds
from flowalign.forecast.memory import device_memory, state_memory
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.judging import decoded
from flowalign.rollouts.task import Task
from flowalign.trainers import Batch, Trainer
from rewards import Reward, RewardBatch, score
from samplers import unscored


def fixture(task: Task, batch: ScoredRollout, prompts: Sequence[PromptRecord], reward: Reward) -> RewardBatch:
    """The leaves of a rollout, as the reward gets them."""
    leaves = batch.forest.tree.leaves
    return decoded(task, prompts, batch.forest.tree.group[leaves], batch.forest.at(leaves), reward.spec.inputs)


def check_reward(reward: Reward, batch: RewardBatch, *, trained: bool) -> Finding:
    """Valid scores, a spread inside groups if it is trained on, and the same scores when asked again, in other company: every
    second image, from the last, beside mirrored ones, in a batch of as many."""
    name, count = f"{'reward' if trained else 'evaluation'} {reward.name}", len(batch)
    rows = torch.arange(count).flip(0)[::2]
    first = score(reward, batch, max_fail_rate=1.0)
    again = score(reward, _with_mirrored(batch.select(rows.repeat(2)[:count]), len(rows)), max_fail_rate=1.0)
    valid, groups = first.valid.all(1), torch.tensor(batch.group_ids)
    spreads = [
        float(ours.std(unbiased=False))
        for column in first.scores.T
        for group in groups.unique()
        if len(ours := column[valid & (groups == group)].double()) > 1
    ]
    varied = sum(spread > 0 for spread in spreads)
    same = torch.equal(again.valid[: len(rows)], first.valid[rows]) and torch.allclose(
        again.scores[: len(rows)], first.scores[rows], rtol=1e-4, atol=1e-5, equal_nan=True
    )
    mean = float(first.scores[valid].double().mean()) if bool(valid.any()) else float("nan")
    figure = (
        f"{int(valid.sum())} of {len(batch)} valid, mean {mean:.3g}, spread in {varied} of {len(spreads)} groups "
        f"(up to {max(spreads, default=0.0):.2g}), {1000 * again.elapsed / len(batch):.0f} ms per image"
    )
    if reward.spec.licence:
        figure += f", licence {reward.spec.licence}"
    advice = ""
    if int(valid.sum()) < 0.5 * len(batch):
        reason = next((text for text in first.info if text), "no reason given")
        advice = f"most images have no score, a run would stop: {reason}"
    elif not same:
        advice = (
            "asked again in another order and company, the same images score otherwise: fix its seeds, and let no score depend "
            "on the rest of the batch (a mean or norm over it)"
        )
    elif trained and spreads and not varied:  # groups of one have no advantage
        advice = "all images of a prompt score the same, so every advantage is 0: take a graded metric, or more noise"
    return Finding(name, not advice, figure, advice)


def _with_mirrored(batch: RewardBatch, first: int) -> RewardBatch:
    """The batch with all samples from number `first` on mirrored."""
    mirrored: dict[str, Any] = {
        name: torch.cat([tensor[:first], tensor[first:].flip(-1)])
        for name, tensor in batch.tensors().items()
        if tensor is not None and tensor.ndim > 1
    }
    return replace(batch, **mirrored)


def check_cost(
    task: Task, trainer: Trainer, batch: ScoredRollout, rows: int, collected: tuple[Batch, int], updated: int
) -> Finding:
    """Counted network rows of a rollout (`rows`), of the trainer's own batch (`collected`) and of its update (`updated`) against
    the topology and against the forecasts (I2). Where a plan selects, the topology is what is left, and the engine's own
    count stands for it."""
    settings, tree = task.rollout, batch.forest.tree
    guided = task.policy.rows_per_state(settings.guidance_scale)
    forecast = settings.plan.forecast(settings.num_inference_steps, settings.group_size)
    seen = len(tree.evaluated) if settings.plan.select(unscored) is None else batch.forest.evaluations
    states, limit = guided * seen, guided * settings.groups * forecast.rollout
    reported = round(batch.metrics["cost/rollout_per_image"] * batch.images)
    ours, (own, sampled) = trainer.forecast(settings), collected
    scale = settings.guidance_scale if ours.guidance_scale is None else ours.guidance_scale
    in_update = max(0, guided * (ours.rolled or 0) - sampled)  # of a trainer whose update samples
    allowed = task.policy.rows_per_state(scale) * (ours.trained + ours.frozen) + in_update
    before = limit if ours.rolled is None else guided * ours.rolled
    figure = (
        f"rollout {rows / batch.images:.2f} rows per image (forecast at most {limit / batch.images:.2f}), update "
        f"{updated / own.images:.2f} (at most {allowed / own.images:.2f})"
    )
    advice = ""
    if not rows == states == reported:
        advice = f"{rows} rows ran, {reported} were reported, {states} are distinct: evaluate each distinct state once"
    elif rows > limit:
        advice = "the rollout costs more than the plan's forecast: Plan.forecast must say the most expensive iteration"
    elif updated > allowed:
        advice = f"the update ran {updated} rows, the forecast allows {allowed}: one row per distinct state and role"
    elif sampled + updated > (whole := before + allowed - in_update):
        advice = f"batch and update ran {sampled + updated} rows, the forecasts allow {whole}: correct Trainer.forecast"
    return Finding("cost", not advice, figure, advice)


def check_memory(config: TrainConfig, device: torch.device) -> Finding:
    """The forecast of a phase of the run against the memory of the device (on a CPU against nothing)."""
    said: list[str] = []
    try:
        state_memory(config, device_memory(config, device), said.append)
    except ConfigError as error:
        return Finding("memory", False, said[0].splitlines()[-1], str(error))
    return Finding("memory", True, said[0].splitlines()[-1])


def check_time(config: TrainConfig, batch: ScoredRollout, update: float, reward: float) -> Finding:
    """Hours of the whole run, from the doctor's few prompts on one device and the forecast's counts; `update`: seconds per image,
    `reward`: per scored picture. On several devices at best as many times less: what they wait for each other is not known."""
    rows, decodes = (batch.metrics[f"cost/{name}_per_image"] * batch.images for name in ("rollout", "decodes"))
    timing = Timing(
        batch.metrics["time/rollout"] / max(1.0, rows), batch.metrics["time/decode"] / max(1.0, decodes), reward, update
    )
    counts, devices = RunCounts.of(config), config.run.device_count or 1
    parts = device_seconds(counts, timing)
    iteration = device_seconds(
        replace(counts, iterations=1, before=0, before_scored=0, evaluation_rows=0, evaluated=0), timing
    )
    hours = sum(parts.values()) / 3600
    shares = ", ".join(f"{name} {_hours(seconds / 3600)}" for name, seconds in parts.items() if seconds)
    return Finding(
        "time", True, f"about {sum(iteration.values()):.1f} s of one device per iteration; whole run {_hours(hours)} GPU-hours ({shares}), "
        f"at best {_hours(hours / devices)} hours on {devices} device{'s' * (devices > 1)}",
    )  # fmt: skip


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 1 else f"{hours:,.1f}"
