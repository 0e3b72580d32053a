"""What a run found: summary.json, and the grid and page that show it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from flowalign.config import TrainConfig, evaluation_schedule
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.paired_gain import PairedGain, paired_gains
from flowalign.models import Policy, Sampling, inspect_checkpoint
from flowalign.models.grid import pipeline_call
from flowalign.models.load_call import load_call
from flowalign.report.doubts import doubts
from flowalign.report.grids import pairs_grid
from flowalign.report.html import FOLDER, write_report
from flowalign.storage.files import write_atomic
from flowalign.storage.metrics_log import read_rows
from rewards import labels_of

# of pairs, as in PairedGain
COUNTS: dict[str, Callable[[PairedGain], int]] = {
    name: attrgetter(name) for name in ("pairs", "wins", "losses", "ties", "dropped", "unscored_base", "unscored_tuned")
}


def summarize(
    config: TrainConfig, policy: Policy, base: EvaluationResult, tuned: EvaluationResult,
    iterations: int, totals: Mapping[str, float], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """summary.json. The figures of the first evaluation reward stand at the top, those of all under `rewards`."""
    rewards, first = gains_table(paired_gains(base, tuned)), labels_of(config.evaluation.rewards[0])[0]
    return {
        "reward": first,
        **{key: column[first] for key, column in rewards.items()},
        "rewards": rewards,
        **summarize_stopped(config, policy, iterations, totals, seconds),
    }


def summarize_stopped(
    config: TrainConfig, policy: Policy, iterations: int, totals: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """summary.json of a run that was stopped after `iterations` iterations: what needs no evaluation of the tuned model."""
    images, settings = max(1, totals["images"]), config.policy
    evaluation, (_, family) = config.evaluation, inspect_checkpoint(settings.path, settings.family)
    setup, arguments = pipeline_call(policy, Sampling(
        evaluation.num_inference_steps, evaluation.guidance_scale, settings.size, evaluation_schedule(config), settings.fps,
    ))  # fmt: skip
    return {
        "seconds": seconds,
        "evaluations_per_image": {phase: totals[phase] / images for phase in ("rollout", "update")},
        "evaluation_unit": "forwards; a backward counts 1 (LoRA) or 2 (full weights), guidance doubles",
        "ratio_drift_max": totals["drift"],
        "iterations": iterations,
        "pipeline": {
            "load": load_call(
                settings.path, settings.family, settings.dtype, settings.vae_dtype, settings.quantization
            ),
            "setup": setup,
            "arguments": arguments,
            "load_lora": family.load_lora(FOLDER),
            "source_images": family.source_images[0],
            "own_fit": family.own_fit,
            "fps": settings.fps,
        },
    }


def gains_table(gains: dict[str, PairedGain]) -> dict[str, dict[str, Any]]:
    """The gains as JSON for summary.json: {base, tuned, gain, gain_ci95, and COUNTS}, each {reward: value}."""
    return {
        "base": {name: gain.base for name, gain in gains.items()},
        "tuned": {name: gain.tuned for name, gain in gains.items()},
        "gain": {name: gain.mean for name, gain in gains.items()},
        "gain_ci95": {name: list(gain.interval) if gain.interval else None for name, gain in gains.items()},
        **{count: {name: read(gain) for name, gain in gains.items()} for count, read in COUNTS.items()},
    }


def write_results(folder: Path, base: EvaluationResult, tuned: EvaluationResult, result: dict[str, Any]) -> str:
    """Writes the grid, summary.json and report.html into the run folder; returns the line to print."""
    pairs_grid(base, tuned, result["reward"], folder / "grids" / "held_out.png")
    write_atomic(folder / "summary.json", json.dumps(result, indent=1).encode())
    report, metrics = write_report(folder), folder / "metrics.jsonl"
    interval = result["gain_ci95"]
    spread = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    return (
        f"held-out {result['reward']}, {len(set(base.uids))} prompts: {result['base']:.3f} → {result['tuned']:.3f}, "
        f"gain {result['gain']:+.3f}{spread} (95 %), {result['seconds']:.0f} s; report: {report}"
        + "".join(
            f"; but {doubt}" for doubt in doubts(result["rewards"], read_rows(metrics) if metrics.exists() else [])
        )
    )
