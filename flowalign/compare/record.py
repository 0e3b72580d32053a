"""One JSON per finished run, small enough to be committed: its scores, its curve and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.compare.plan import Planned
from flowalign.errors import RunError
from flowalign.evaluation.appearance import Appearance, distances_across_prompts
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.result_file import load_result
from flowalign.storage.files import DamagedFile, read_json, reading, write_atomic
from flowalign.storage.metrics_log import Row, read_rows

COSTS = ("evaluations", "decodes", "reward_calls", "seconds")
DIGITS = 6  # of a score


@dataclass(frozen=True, eq=False)
class Point:
    """One evaluation: after `iteration` iterations, at a cost of COSTS so far; scores [P] of the first reward by prompt, in the
    order of Record.prompts (nan = not valid)."""

    iteration: int
    costs: Mapping[str, float]
    scores: np.ndarray


@dataclass(frozen=True, eq=False)
class Record:
    """A finished run. curve: its evaluations, the base first and the tuned model last. prompts: uids. others: by label the
    scores [P] of the base and of the tuned model by other rewards, and how their pictures look (see `looks`). files, overrides: of
    its configuration."""

    method: str
    seed: int
    reward: str
    prompts: tuple[int, ...]
    curve: tuple[Point, ...]
    totals: Mapping[str, float]
    others: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def write_record(run: Planned) -> None:
    """Makes the record of a run that is finished. DamagedFile naming what its folder lacks."""
    folder = run.folder
    with reading(folder / "summary.json"):
        first = read_json(folder / "summary.json")["reward"]
    with reading(folder / "metrics.jsonl"):
        costs = costs_by_iteration(read_rows(folder / "metrics.jsonl"))
    rows = read_rows(folder / "evaluations.jsonl")
    if not rows or rows[0]["step"] != 0 or rows[-1]["step"] != len(costs) - 1:
        raise DamagedFile(
            f"{folder / 'evaluations.jsonl'} does not go from the base to the end of the run: remove {folder}"
        )
    provenance = read_json(folder / "provenance.json")
    content = {
        "method": run.method,
        "seed": run.seed,
        "config_hash": run.config_hash,
        "files": list(run.files),
        "overrides": [*run.overrides, run.budget.override],
        "provenance": {key: provenance.get(key) for key in ("git", "machine", "versions")},
        "reward": first,
        "totals": {"iterations": len(costs) - 1, **costs[-1]},
        "curve": [
            {"iteration": row["step"], **costs[row["step"]], "score": _mean(row["scores"][first])} for row in rows
        ],
        "uids": rows[0]["uids"],
        "base": _all_scores(folder / "evaluation" / "base.safetensors", rows[0]),
        "tuned": _all_scores(folder / "evaluation" / "tuned.safetensors", rows[-1]),
        "on_the_way": [_rounded(row["scores"][first]) for row in rows[1:-1]],
    }
    write_atomic(run.record, _lines(content).encode())


def is_beyond(run: Planned) -> bool:
    """Whether the folder of a run has iterations that its budget does not allow: it was begun with a larger one."""
    path = run.folder / "metrics.jsonl"
    costs = costs_by_iteration(read_rows(path) if path.exists() else [])
    last = len(costs) - 1
    # the rule by which a run ends, at its last iteration but one; costs are rounded to 3 digits
    return last > 1 and (costs[-2][run.budget.unit] - 0.001) * last > run.budget.amount * (last - 1)


def _all_scores(pictures: Path, row: Row) -> dict[str, list[float | int | None]]:
    """Of one evaluation: its rewards, then `looks` of the pictures it kept."""
    return {name: _rounded(scores) for name, scores in (looks(load_result(pictures)) | row["scores"]).items()}


def looks(result: EvaluationResult) -> dict[str, list[float | None]]:
    """By label a number per image, without a model: image/contrast and image/saturation as rewards.ImageStatistics has them, and
    prompts/distance, whose mean is `distance_across_prompts` of `flowalign evaluate` (see `distances_across_prompts`)."""
    look = Appearance.of(result.pixels)
    found = {f"image/{name}": look.monitors[name] for name in ("contrast", "saturation")}
    found["prompts/distance"] = distances_across_prompts(look.thumbnails, result.samples)
    return {name: [value if value == value else None for value in values.tolist()] for name, values in found.items()}


def read_record(run: Planned) -> Record:
    """DamagedFile naming the file for what `write_record` did not write, or of another run."""
    return record_of(run.record, (run.method, run.seed))


def record_of(path: Path, expected: tuple[str, int] | None = None) -> Record:
    """The record in a file. expected: its method and seed."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        method, seed = content["method"], content["seed"]
        if expected is not None and expected != (method, seed):
            raise ValueError(f"it is of {method} seed {seed}, not of {expected[0]} seed {expected[1]}")
        first, uids = content["reward"], content["uids"]
        base, tuned, prompts = content["base"], content["tuned"], tuple(dict.fromkeys(uids))
        scores = [base[first], *content["on_the_way"], tuned[first]]
        points = [
            Point(point["iteration"], {name: point[name] for name in COSTS}, by_prompt(uids, prompts, values))
            for point, values in zip(content["curve"], scores, strict=True)
        ]
        others = {
            name: (by_prompt(uids, prompts, base[name]), by_prompt(uids, prompts, tuned[name]))
            for name in base
            if name != first and name in tuned
        }
        totals = {name: float(content["totals"][name]) for name in COSTS}
        files, overrides = tuple(content["files"]), tuple(content["overrides"])
        return Record(method, seed, first, prompts, tuple(points), totals, others, files, overrides)


def costs_by_iteration(rows: Sequence[Row]) -> list[dict[str, float]]:
    """COSTS after 0, 1, 2, … iterations of metrics.jsonl; without those of evaluations on held-out prompts. RunError for
    rows of a trainer that does not count."""
    counted = ("cost/images", "cost/rollout_per_image", "cost/decodes_per_image", "cost/reward_calls_per_image")
    if rows and (missing := [name for name in counted if name not in rows[0]]):
        raise RunError(
            f"got metrics without {', '.join(missing)}, which a comparison adds up; expected a trainer that logs them, as the "
            "`metrics` of a collected rollout do"
        )
    sums = dict.fromkeys(COSTS, 0.0)
    found = [dict(sums)]
    for row in rows:
        per_image = {
            "evaluations": row["cost/rollout_per_image"] + row.get("cost/update_per_image", 0.0),
            "decodes": row["cost/decodes_per_image"],
            "reward_calls": row["cost/reward_calls_per_image"],
        }
        for name, value in per_image.items():
            sums[name] += row["cost/images"] * value + row.get(f"cost/prepare_{name}", 0.0)
        sums["seconds"] += row["time/iteration"] + row.get("time/prepare", 0.0)
        found.append({name: round(value, 3) for name, value in sums.items()})
    return found


def by_prompt(uids: Sequence[int], prompts: Sequence[int], values: Sequence[float | None]) -> np.ndarray:
    """[P] means over the valid samples of each prompt; nan without one."""
    places = {uid: place for place, uid in enumerate(prompts)}
    index = np.array([places[uid] for uid in uids])
    scores = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    ok = ~np.isnan(scores)
    counts = np.bincount(index[ok], minlength=len(prompts))
    sums = np.bincount(index[ok], scores[ok], minlength=len(prompts))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _rounded(scores: Sequence[float | None]) -> list[float | int | None]:
    """To DIGITS digits; whole numbers as such."""
    short = [None if score is None else float(f"{score:.{DIGITS}g}") for score in scores]
    return [int(score) if score is not None and score == int(score) else score for score in short]


def _mean(scores: Sequence[float | None]) -> float | None:
    valid = [score for score in scores if score is not None]
    return sum(valid) / len(valid) if valid else None


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line per entry, and one per list of scores."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
            text = "{\n" + inner + "\n }"
        elif key in ("curve", "on_the_way"):
            text = "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
