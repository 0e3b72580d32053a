"""What is done before the model is loaded: the forecast of the cost, prompts, what an earlier launch of this run saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowalign.buckets import bucket_counts
from flowalign.config import TrainConfig
from flowalign.data import PromptRecord, check_images, digest, load_prompts
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Sharding
from flowalign.errors import ConfigError
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.result_file import load_result
from flowalign.forecast.counts import RunCounts
from flowalign.forecast.memory import device_memory, state_memory
from flowalign.media import Size
from flowalign.models.checks import path_of
from flowalign.rollouts.completions import cost_of_completions
from flowalign.rollouts.rolling import grow, leaves_per_group
from flowalign.run.held_out_rewards import held_out_rewards
from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import Tensors
from rewards import labels_of
from samplers import Cost


def state_forecast(
    config: TrainConfig, device: torch.device, processes: Processes, sharding: Sharding = "none"
) -> None:
    """Prints counts and memory, on the main process. ConfigError if a phase cannot fit into the device; a CPU has room for what the
    machine has, and nothing is measured for it unless run.device_memory asks."""

    def say(text: str) -> None:
        if processes.is_main:
            print(text, flush=True)

    say(forecast(config))
    room = device_memory(config, device)
    if room is not None:
        state_memory(config, room, say, processes.count, sharding)


def forecast(config: TrainConfig) -> str:
    """The batch arithmetic and the network evaluations of one iteration and of the run, in the most expensive case."""
    rollout, run, counts = config.rollout, config.run, RunCounts.of(config)
    cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
    samples, probes = leaves_per_group(rollout)
    update, images, before = config.trainer.forecast(rollout), counts.images, counts.before
    notes = [*update.notes, *_notes(config, cost, samples, probes)]
    specs = [reward.spec for reward in config.process_rewards]
    if steps := [spec.completion_steps for spec in specs if spec.scope == "completion"]:
        tree = grow(rollout, 0, 0, [0])
        states = sum(cost_of_completions(tree, each)[0] for each in steps)
        notes.append(
            f"completions: at most {states / samples:.2f} per image, decoded and scored, of states of the rollout"
        )
    if before:
        notes.insert(
            0, f"before the first iteration: at most {before:,} forwards, {update.before_scored:,} images scored"
        )
    return "\n".join(
        [
            f"run {run.name}: {run.iterations} iterations × {rollout.groups} prompts × {samples} images = "
            f"{run.iterations * images:,} images",
            f"per iteration: {images} images, at most {update.trained} trained states, {update.updates} update(s)",
            f"network evaluations per image: rollout {counts.sampled / (1 + rollout.refill) / images:.2f}, update at most "
            f"{counts.trained / images:.2f} forward and backward"
            + (f", without gradient at most {counts.frozen / images:.2f}" if counts.frozen else ""),
            f"whole run: at most {before + run.iterations * (counts.sampled + counts.frozen):,} forwards, "
            f"{run.iterations * counts.trained:,} with backward",
            *notes,
        ]
    )


def _notes(config: TrainConfig, cost: Cost, samples: int, probes: int) -> list[str]:
    """Lines on what a run need not have. cost: of a group that ends in `samples` and `probes`."""
    rollout, run, evaluation, notes = config.rollout, config.run, config.evaluation, list[str]()
    for limit, unit in ((run.max_evaluations, "network evaluations"), (run.max_seconds, "seconds of iterations")):
        if limit is not None:
            notes.append(f"ends before an iteration beyond {limit:,} {unit}")
    if rollout.buckets:
        counts = bucket_counts(config.training_prompts())
        notes.append("buckets: " + ", ".join(f"{_said(size)} with {count:,} prompts" for size, count in counts.items()))
    if probes:
        notes.append(f"probes: {probes / samples:.2f} per image, decoded and scored but not counted as images")
    if cost.previews:
        notes.append(f"previews: {cost.previews / samples:.2f} per image, decoded and scored to select, then discarded")
    if rollout.refill:
        notes.append(
            f"refill: the whole run counts {rollout.refill} further rollouts of each group, for a score that it lacks"
        )
    if rollout.reward_guidance is not None:
        path = path_of(config.policy.path, config.policy.family)
        tree = grow(rollout, 0, 0, [0])
        calls = rollout.reward_guidance.calls(tree, rollout.kernel.bind(path), path)
        notes.append(f"reward guidance: at most {calls / samples:.2f} more scores per image, at states of its rollout")
    if rollout.guidance_scale != evaluation.guidance_scale:
        notes.append(
            f"guidance: rollout.guidance_scale={rollout.guidance_scale:g}, "
            f"evaluation.guidance_scale={evaluation.guidance_scale:g}; evaluations do not sample as the rollout does"
        )
    if evaluation.schedule is not None and evaluation.schedule != rollout.schedule:
        notes.append(
            f"schedule: rollout.schedule={rollout.schedule}, evaluation.schedule={evaluation.schedule}; evaluations do not "
            "sample as the rollout does"
        )
    return notes


def _said(size: Size | None) -> str:
    return "" if size is None else f"{size.height}×{size.width}" + f"×{size.frames}" * (size.frames > 1)


@dataclass(frozen=True)
class Prompts:
    """The prompt sets of a run: what it trains on, and what it is evaluated on."""

    train: list[PromptRecord]
    held_out: list[PromptRecord]

    @staticmethod
    def of(config: TrainConfig) -> Prompts:
        """ConfigError for source images that cannot be read."""
        held_out = load_prompts(config.evaluation.prompts)
        prompts = Prompts(config.training_prompts(), held_out[: config.evaluation.count])
        try:
            check_images([*prompts.train, *prompts.held_out])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return prompts

    def digests(self) -> dict[str, str]:
        """Hashes by which a resumed run recognizes its prompts."""
        return {"train": digest(self.train), "held_out": digest(self.held_out)}


@dataclass(frozen=True, eq=False)
class Saved:
    """What an earlier launch of this run saved in the run folder.

    iteration: of the latest checkpoint, 0 without one. tensors, state: what it holds, both empty without one. base: the
    evaluation of the base model, None if it must be made."""

    iteration: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]
    base: EvaluationResult | None

    def changed_prompts(self, digests: dict[str, str]) -> dict[str, tuple[str, str]]:
        """{prompt set: (former digest, digest now)} of those that are not what the checkpoint was trained with."""
        former = self.state.get("prompts", {}) if self.iteration else {}
        return {name: (former[name], now) for name, now in digests.items() if name in former and former[name] != now}


def read_saved(config: TrainConfig, folder: Path, digests: dict[str, str]) -> Saved:
    """Reads and checks what the folder holds. ConfigError if the base evaluation is lost, or if prompts have changed: those of the
    evaluation never may, those of the training with run.resume=changed."""
    path, base_file = checkpoint.latest(folder), folder / "evaluation" / "base.safetensors"
    iteration = 0 if path is None else checkpoint.step_of(path)
    tensors, state = ({}, {}) if path is None else checkpoint.load(path)
    if iteration and not base_file.exists():
        raise ConfigError(
            f"{base_file} is missing, though the run is at iteration {iteration}: restore it, or choose another run.name"
        )
    base = load_result(base_file) if base_file.exists() else None
    asked = base is None or _is_asked_for(base, config, digests["held_out"])
    if path is None and not asked:
        base = None  # nothing is trained yet, and the prompts have changed: evaluated again
    saved = Saved(iteration, tensors, state, base)
    others = saved.changed_prompts(digests)
    if "held_out" in others:
        raise ConfigError(
            f"the first {config.evaluation.count} prompts of {config.evaluation.prompts} have changed since {folder} was begun, "
            "and the base evaluation belongs to them: restore them, or choose another run.name"
        )
    if base is not None and not asked:
        raise ConfigError(f"{base_file} is of another run: restore it, or choose another run.name")
    if others and config.run.resume != "changed":
        raise ConfigError(
            f"the prompts of {config.prompts} have changed since {folder} was begun: restore them, choose another run.name, or "
            "set run.resume=changed to go on with them"
        )
    return saved


def _is_asked_for(base: EvaluationResult, config: TrainConfig, prompts: str) -> bool:
    """Whether the evaluation is of these prompts (their digest), this seed and these rewards."""
    labels = {label for reward in held_out_rewards(config) for label in labels_of(reward)}
    return (base.digest, base.seed, base.scores.keys()) == (prompts, config.evaluation.seed, labels)
