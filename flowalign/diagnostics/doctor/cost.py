"""Checks of rewards, counted cost, memory and time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from flowalign.config import TrainConfig
from flowalign.data import PromptRecord
from flowalign.diagnostics.doctor.base import Finding
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.judging import decoded
from flowalign.rollouts.task import Task
from flowalign.trainers import Batch, Trainer
from rewards import Reward, RewardBatch, score
from samplers import unscored

MIB = 2**20


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
    elif trained and not varied:
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
    allowed = task.policy.rows_per_state(scale) * (ours.trained + ours.frozen)
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
    elif sampled + updated > before + allowed:
        advice = f"batch and update ran {sampled + updated} rows, the forecasts allow {before + allowed}: correct Trainer.forecast"
    return Finding("cost", not advice, figure, advice)


def check_memory(config: TrainConfig, task: Task, batch: ScoredRollout, available: float | None = None) -> Finding:
    """Forecast in MiB, less activations and the pipeline's other parts, against the memory of the device."""
    trained = [p for _, p in task.policy.trainable_parameters()]
    weights = sum(p.numel() * p.element_size() for net in task.policy.modules().values() for p in net.parameters())
    own = sum(p.numel() * p.element_size() for p in trained)
    roles = config.roles.values()
    copies = len(roles) + config.policy.reference_copy if config.policy.trainable == "full" else 0
    frozen = weights - own + copies * own
    optimized = 1 + sum(role.update == "trained" for role in roles)
    states = batch.forest.states.numel() * batch.forest.states.element_size() * config.rollout.groups
    parts = {
        "trainable": own,
        "frozen": frozen,
        "gradient + AdamW": 3 * own * optimized,
        "EMA": own if config.run.ema_decay is not None else 0,
        "states": states / task.rollout.groups,
    }
    total, room = sum(parts.values()), available or device_memory(trained[0].device)
    figure = ", ".join(f"{name} {size / MIB:.1f}" for name, size in parts.items())
    advice = "that does not fit: lower rollout.groups or group_size, train a LoRA, or take policy.dtype=bf16"
    return Finding("memory", total <= room, f"{figure} MiB of {room / MIB:,.0f}", "" if total <= room else advice)


def device_memory(device: torch.device) -> float:
    """Bytes of the device's memory: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return prod(os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES"))


def check_time(config: TrainConfig, task: Task, batch: ScoredRollout, update: float, reward: float) -> Finding:
    """Seconds of one iteration, scaled from the doctor's few prompts; `update`: seconds per image,
    `reward`: per scored picture."""
    images = config.rollout.groups * batch.images / task.rollout.groups
    rollout = (batch.metrics["time/rollout"] + batch.metrics["time/decode"]) / batch.images
    scored = images * len(batch.scores) / batch.images  # probes too
    parts = {"rollout": images * rollout, "reward": scored * reward, "update": images * update}
    total = sum(parts.values())
    figure = f"about {total:.1f} s per iteration (" + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + ")"
    return Finding("time", True, f"{figure}, {total * config.run.iterations / 60:.1f} min for {config.run.iterations}")
