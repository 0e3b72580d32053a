"""What sharing saves: an iteration as configured, beside the same with less sharing, taking turns in one process.

`merged` is the configuration as it is. `per-edge`: one forward and backward per trained step in place of one per distinct
state (and as many reference rows). `unshared`: that, and in the rollout every image has its own copy of its prefix.
Variants take turns (A B C A B C …), so that a busy machine slows all alike; seconds are medians over iterations, counts
are exact. No optimizer step is taken: all variants see the same weights.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig, load_config
from flowalign.config.layers import split_arguments
from flowalign.data import PromptRecord, prompts_of_iteration
from flowalign.diagnostics.measure import count_calls, now, one_pass_per_edge
from flowalign.errors import ConfigError
from flowalign.rollouts.task import Task
from flowalign.storage.files import write_atomic
from flowalign.trainers import EdgeTrainer
from rewards import close
from samplers import Forest, Kernel, Noise, Select, Tree, Velocity, unshared

VARIANTS = ("merged", "per-edge", "unshared")
UNIT = "forward equivalents; a trained row counts 2 (LoRA) or 3 (full weights), a reference row 1, guidance doubles"


def rollout_unshared(
    velocity: Velocity, x_start: Tensor, sigmas: Tensor, tree: Tree, kernel: Kernel, noise: Noise, *,
    micro_batch: int | None = None, select: Select | None = None, keep_velocities: bool = False,
) -> Forest:  # fmt: skip
    """`rollout` that evaluates every state once for each leaf that it leads to. ConfigError for what it cannot do."""
    if select is not None or keep_velocities:
        raise ConfigError(
            "got a plan that selects states, or an objective that reads the rollout's velocities; expected neither, since code "
            "without sharing has none of it: leave out the variant 'unshared'"
        )
    if kernel.uses_roots:
        raise ConfigError(
            f"got {type(kernel).__name__}, whose steps depend on the numbers of states; expected a rollout without reward "
            "guidance, since the copies have others: leave out the variant 'unshared'"
        )
    return unshared(tree).rollout(velocity, x_start, sigmas, kernel, noise, micro_batch=micro_batch)


def compare(config: TrainConfig, variants: Sequence[str], iterations: int) -> list[dict[str, Any]]:
    """One row per variant, with ratios to the first; see `_row`."""
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants:
        raise ConfigError(f"got variants {list(variants)}; expected some of {', '.join(VARIANTS)}")
    if iterations < 1:
        raise ConfigError(f"got iterations={iterations}; expected at least 1")
    trainer = config.trainer.forecast(config.rollout).inspection.edges
    if trainer is None:
        raise ConfigError(
            f"got trainer {type(config.trainer).__name__}; expected one whose loss is a sum over the steps of a rollout, such as "
            "PolicyGradient: there is nothing to compare it with"
        )
    policy = policy_of(config, "cuda" if torch.cuda.is_available() else "cpu")
    task = task_of(config, policy)
    prompts, task = list(task.prompts), replace(task, prompts=())  # without what comes before the first iteration
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    try:
        for iteration in range(-1, iterations):  # the first one warms up
            chosen = prompts_of_iteration(prompts, config.rollout.groups, config.run.seed, max(iteration, 0))
            for name in variants:
                found = _iteration(task, trainer, chosen, max(iteration, 0), name)
                if iteration >= 0:
                    measured[name].append(found)
    finally:
        for reward in config.rollout_rewards:
            close(reward)
    backward = 2 if config.policy.trainable == "lora" else 3
    rows = [_row(name, found, backward) for name, found in measured.items()]
    if any(row["evaluations"]["update"] == 0 for row in rows):
        raise ConfigError(
            "got no trained step in any of the iterations; expected images of a prompt to score differently: take a graded "
            "reward, or trainer.signal.select=flowalign.selectors.AllEdges to time the update all the same"
        )
    return [{**row, "ratio": _ratios(row, rows[0])} for row in rows]


def _iteration(
    task: Task, trainer: EdgeTrainer, prompts: Sequence[PromptRecord], iteration: int, variant: str
) -> dict[str, float]:
    """Counts and seconds of one iteration."""
    trainer.prepare(task, None)
    reset_peak()
    with count_calls(task.policy) as calls:
        began = now()
        batch = trainer.collect(prompts, iteration, rollout_unshared if variant == "unshared" else None)
        collected, sampled = now(), len(calls)
        parts = [(trainer, 1.0)] if variant == "merged" else one_pass_per_edge(trainer, task, batch)
        updating, backward = now(), 0.0
        for part, share in parts:
            for update in part.updates(batch):
                for micro_batch in update.micro_batches:
                    loss = share * micro_batch()
                    forwarded = now()
                    loss.backward()
                    backward += now() - forwarded
        ended = now()
    for _, parameter in task.policy.trainable_parameters():
        parameter.grad = None
    rollout, update_calls = calls[:sampled], calls[sampled:]
    metrics = batch.metrics
    return {
        "images": batch.images,
        "rollout": sum(call.rows for call in rollout),
        "trained": sum(call.rows for call in update_calls if call.trained),
        "reference": sum(call.rows for call in update_calls if not call.trained),
        "s_rollout": metrics["time/rollout"],
        "s_decode": metrics["time/decode"],
        "s_reward": metrics["time/reward"],
        "s_update": ended - updating,
        "s_wall": collected - began + ended - updating,
        "s_forward": sum(call.seconds for call in calls),
        "s_backward": backward,
        "peak": peak(),
    }


def _row(name: str, found: list[dict[str, float]], backward: int) -> dict[str, Any]:
    """Evaluations per image, seconds per iteration and phase, wall over the bare parts, peak memory in MiB.

    bare: network forwards, backwards, decoding and reward, timed by themselves; overhead = wall / their sum."""
    images = sum(one["images"] for one in found)
    per_image = {kind: sum(one[kind] for one in found) / images for kind in ("rollout", "trained", "reference")}
    update = backward * per_image["trained"] + per_image["reference"]
    seconds = {k: median(one[f"s_{k}"] for one in found) for k in ("rollout", "decode", "reward", "update", "wall")}
    bare = {k: median(one[f"s_{k}"] for one in found) for k in ("forward", "backward", "decode", "reward")}
    return {
        "variant": name,
        "images": images,
        "evaluations": {**per_image, "update": update, "total": per_image["rollout"] + update},
        "seconds": seconds,
        "bare": bare,
        "overhead": median(
            one["s_wall"] / sum(one[f"s_{k}"] for k in ("forward", "backward", "decode", "reward")) for one in found
        ),
        "peak_mib": max(one["peak"] for one in found),
    }


def _ratios(row: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    return {
        "evaluations": row["evaluations"]["total"] / first["evaluations"]["total"],
        "update_evaluations": row["evaluations"]["update"] / first["evaluations"]["update"],
        "wall": row["seconds"]["wall"] / first["seconds"]["wall"],
        "update_seconds": row["seconds"]["update"] / first["seconds"]["update"],
        "peak": row["peak_mib"] / first["peak_mib"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| variant | evaluations per image: rollout + update = total | s: rollout, decode, reward, update | wall s | "
        "wall / bare | peak MiB | × evaluations | × update s | × wall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts, seconds, ratio = row["evaluations"], row["seconds"], row["ratio"]
        phases = ", ".join(f"{seconds[k]:.2f}" for k in ("rollout", "decode", "reward", "update"))
        lines.append(
            f"| {row['variant']} | {counts['rollout']:.2f} + {counts['update']:.2f} = {counts['total']:.2f} | {phases} | "
            f"{seconds['wall']:.2f} | {row['overhead']:.2f} | {row['peak_mib']:,.0f} | {ratio['evaluations']:.2f} | "
            f"{ratio['update_seconds']:.2f} | {ratio['wall']:.2f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ memory


def reset_peak() -> None:
    """Restarts what `peak` measures, where the system can (CUDA; Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak() -> float:
    """MiB: allocated on the device, or the process's resident memory (since `reset_peak`, or since its start)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str]) -> None:
    """`CONFIG … [--iterations N] [--variants A,B] [--output FOLDER] [key=value …]`. Raises ConfigError."""
    reader = argparse.ArgumentParser(prog="flowalign benchmark", description=__doc__)
    reader.add_argument("arguments", nargs="+", metavar="CONFIG.yaml … key=value", help="files, then overrides")
    reader.add_argument("--iterations", type=int, default=3)
    reader.add_argument("--variants", default=",".join(VARIANTS), help="the first is what the others are compared with")
    reader.add_argument("--output", type=Path, help="folder for benchmark.md and benchmark.json")
    asked = reader.parse_intermixed_args(list(arguments))
    files, overrides = split_arguments(asked.arguments)
    config, _ = load_config(files, overrides)
    if asked.output is not None:
        try:
            asked.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"got --output {asked.output}, which cannot be made ({error}): name another folder"
            ) from error
    rows = compare(config, asked.variants.split(","), asked.iterations)
    print(table(rows))
    if asked.output is not None:
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        result = {"config": files, "overrides": overrides, "iterations": asked.iterations, "unit": UNIT,
                  "device": device, "torch": torch.__version__, "rows": rows}  # fmt: skip
        write_atomic(asked.output / "benchmark.json", json.dumps(result, indent=1).encode())
        write_atomic(asked.output / "benchmark.md", (table(rows) + "\n").encode())
