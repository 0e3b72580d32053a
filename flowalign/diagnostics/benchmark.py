"""What sharing saves: an iteration as configured, beside the same with less sharing, taking turns in one process.

`merged` is the configuration as it is. `per-edge`: one forward and backward per trained step in place of one per distinct
state (and as many reference rows). `unshared`: that, and in the rollout every image has its own copy of its prefix, as in a
plain loop over images. Variants take turns (A B C A B C …), so that a busy machine slows all alike; seconds are medians over
iterations, counts are exact. No optimizer step is taken: all variants see the same weights.

All stand beside the bare network: calls of it without adapters, rollout.micro_batch rows each, one after the other. On a GPU
times are those of its own events, and the places where the host waited for it are counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowalign.buckets import prompts_of_iteration
from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig, load_config
from flowalign.config.layers import split_arguments
from flowalign.data import PromptRecord
from flowalign.diagnostics.device import elapsed, mark, peak, reset_peak, waits
from flowalign.diagnostics.measure import count_calls, one_pass_per_edge
from flowalign.errors import ConfigError
from flowalign.rollouts.task import Task
from flowalign.storage.files import write_atomic
from flowalign.trainers import EdgeTrainer
from rewards import close
from samplers import Forest, Kernel, Noise, Select, Tree, Velocity, normal, unshared

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
    bare = bare_network(task, prompts)
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
    rows = [_row(name, found, backward, bare) for name, found in measured.items()]
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
        began = mark()
        with waits() as waited_rollout:
            batch = trainer.collect(prompts, iteration, rollout_unshared if variant == "unshared" else None)
        collected, sampled, rollout_peak = mark(), len(calls), peak()
        parts = [(trainer, 1.0)] if variant == "merged" else one_pass_per_edge(trainer, task, batch)
        reset_peak()
        updating, backwards = mark(), []
        with waits() as waited_update:
            for part, share in parts:
                for update in part.updates(batch):
                    for micro_batch in update.micro_batches:
                        loss = share * micro_batch()
                        forwarded = mark()
                        loss.backward()
                        backwards.append((forwarded, mark()))
        ended = mark()
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
        "s_update": elapsed(updating, ended),
        "s_wall": elapsed(began, collected) + elapsed(updating, ended),
        "s_forward": sum(call.seconds for call in calls),
        "s_backward": sum(elapsed(*pair) for pair in backwards),
        "peak_rollout": rollout_peak,
        "peak_update": peak(),
        "waits_rollout": len(waited_rollout),
        "waits_update": len(waited_update),
    }


@torch.no_grad()
def bare_network(task: Task, prompts: Sequence[PromptRecord], repeats: int = 3) -> tuple[float, float]:
    """(seconds, floating-point operations) of a row of the network without adapters, in calls of rollout.micro_batch states as the
    rollout guides them: the fastest of `repeats`. Of a policy that trains full weights: the network itself."""
    policy, settings = task.policy, task.rollout
    shape = policy.latent_shape(task.size)
    rows_per_state = policy.rows_per_state(settings.guidance_scale)
    conditions = policy.encode(prompts[:1], negative=rows_per_state > 1, size=task.size)
    adapted = any(".lora_" in name for name, _ in policy.trainable_parameters())

    def called(states: int) -> float:
        x = policy.start(normal((states, *shape), "benchmark"))
        rows = conditions.rows(torch.zeros(states, dtype=torch.int64))
        began = mark()
        policy.velocity(x, torch.full((states,), 0.5), rows, guidance_scale=settings.guidance_scale)
        return elapsed(began, mark())

    before = policy.evaluations
    with policy.role("reference") if adapted else nullcontext():
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            called(1)
        least = min(called(settings.micro_batch) for _ in range(repeats + 1))
    policy.evaluations = before
    return least / (settings.micro_batch * rows_per_state), counter.get_total_flops() / rows_per_state


def _row(name: str, found: list[dict[str, float]], backward: int, bare_row: tuple[float, float]) -> dict[str, Any]:
    """Evaluations per image, seconds per iteration and phase, wall over the bare parts, peak memory in MiB.

    bare: network forwards, backwards, decoding and reward, timed by themselves; overhead = wall / their sum. over_network: the
    rollout over as many rows of the bare network (`bare_row`: seconds and operations of one). tflops: operations of all evaluations
    in a second of wall time. waits: how often the host waited for a GPU."""
    images = sum(one["images"] for one in found)
    per_image = {kind: sum(one[kind] for one in found) / images for kind in ("rollout", "trained", "reference")}
    update = backward * per_image["trained"] + per_image["reference"]
    seconds = {k: median(one[f"s_{k}"] for one in found) for k in ("rollout", "decode", "reward", "update", "wall")}
    bare = {k: median(one[f"s_{k}"] for one in found) for k in ("forward", "backward", "decode", "reward")}
    row_seconds, row_operations = bare_row
    each = images / len(found)
    total = per_image["rollout"] + update
    return {
        "variant": name,
        "images": images,
        "evaluations": {**per_image, "update": update, "total": total},
        "seconds": seconds,
        "bare": bare,
        "overhead": median(
            one["s_wall"] / sum(one[f"s_{k}"] for k in ("forward", "backward", "decode", "reward")) for one in found
        ),
        "over_network": seconds["rollout"] / (row_seconds * per_image["rollout"] * each),
        "images_per_second": each / seconds["wall"],
        "tflops": total * each * row_operations / seconds["wall"] / 1e12,
        "peak_mib": {phase: max(one[f"peak_{phase}"] for one in found) for phase in ("rollout", "update")},
        "waits": {phase: max(int(one[f"waits_{phase}"]) for one in found) for phase in ("rollout", "update")},
    }


def _ratios(row: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    return {
        "evaluations": row["evaluations"]["total"] / first["evaluations"]["total"],
        "update_evaluations": row["evaluations"]["update"] / first["evaluations"]["update"],
        "wall": row["seconds"]["wall"] / first["seconds"]["wall"],
        "update_seconds": row["seconds"]["update"] / first["seconds"]["update"],
        "peak": max(row["peak_mib"].values()) / max(first["peak_mib"].values()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| variant | evaluations per image: rollout + update = total | s: rollout, decode, reward, update | wall s | images/s | TFLOP/s | "
        "wall / bare | rollout / bare network | peak MiB: rollout, update | waits: rollout, update | × evaluations | × update s | × wall |",
        "|" + "---|" * 13,
    ]
    for row in rows:
        counts, seconds, ratio = row["evaluations"], row["seconds"], row["ratio"]
        phases = ", ".join(f"{seconds[k]:.2f}" for k in ("rollout", "decode", "reward", "update"))
        peaks, waited = (", ".join(f"{value:,.0f}" for value in row[key].values()) for key in ("peak_mib", "waits"))
        lines.append(
            f"| {row['variant']} | {counts['rollout']:.2f} + {counts['update']:.2f} = {counts['total']:.2f} | {phases} | "
            f"{seconds['wall']:.2f} | {row['images_per_second']:.2f} | {row['tflops']:.3g} | {row['overhead']:.2f} | "
            f"{row['over_network']:.2f} | {peaks} | {waited} | {ratio['evaluations']:.2f} | {ratio['update_seconds']:.2f} | "
            f"{ratio['wall']:.2f} |"
        )
    return "\n".join(lines)


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
