"""The page of an evaluation: its figures, its images prompt by prompt, a blind vote and the training curves, in one file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.paired_gain import direction
from flowalign.report.charts import curves
from flowalign.report.page import template
from flowalign.report.panels import health_panels, reward_panels
from flowalign.report.picture_urls import PictureURLs, picture_urls
from flowalign.storage.metrics_log import Row

STATIC = 8  # prompts that are shown without script


@dataclass(frozen=True)
class Cell:
    """A cell of a table. sort: what it is sorted by, "" if it has no value."""

    text: str
    sort: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """head: (label, whether its cells are numbers)."""

    head: list[tuple[str, bool]]
    lines: list[list[Cell]]


def evaluation_page(
    columns: Mapping[str, EvaluationResult],
    metrics: Mapping[str, Any],
    *,
    title: str,
    runs: Mapping[str, Sequence[Row]] | None = None,
    fps: float = 8.0,
) -> str:
    """The HTML file.

    columns: results of the same prompts, samples, seed and rewards; the others are compared with the first. metrics: their
    metrics.json. runs: {name: rows of its metrics.jsonl}, whose curves are shown. fps: of clips, if the results hold
    videos and do not say it."""
    own = next(iter(columns.values())).fps
    pixels = [result.pixels for result in columns.values()]
    pictures = picture_urls(pixels, own or fps, sources=next(iter(columns.values())).sources)
    rows, runs = _rows(columns, pictures), runs or {}
    logged = [row for each in runs.values() for row in each]
    data = _data(columns, rows, pictures)
    return template("flowalign.report", "evaluation.html").render(
        title=title, metrics=metrics, columns=list(columns), rewards=data["rewards"], data=data, static=rows[:STATIC],
        summary=_summary(metrics), notes=_notes(metrics), results=_results(metrics), monitors=_monitors(metrics),
        settings=_settings(metrics), pictures=pictures, runs=list(runs),
        reward_curves=curves(runs, reward_panels(logged)), health_curves=curves(runs, health_panels(logged)),
    )  # fmt: skip


def _rows(columns: Mapping[str, EvaluationResult], pictures: PictureURLs) -> list[dict[str, Any]]:
    """One row per image of a column: what the page's script shows."""
    first = next(iter(columns.values()))
    prompts = len(set(first.uids))
    scores = [
        list(zip(*(map(_known, each.scores[reward].tolist()) for reward in first.scores), strict=True))
        for each in columns.values()
    ]
    return [
        {
            "uid": uid, "sample": place // prompts, "prompt": prompt, "scores": [each[place] for each in scores],
            "images": [urls[place] for urls in pictures.stills], "clips": [urls[place] for urls in pictures.clips],
        }
        for place, (uid, prompt) in enumerate(zip(first.uids, first.prompts, strict=True))
    ]  # fmt: skip


def _data(columns: Mapping[str, EvaluationResult], rows: list[dict[str, Any]], pictures: PictureURLs) -> dict[str, Any]:
    first = next(iter(columns.values()))
    content = {
        "columns": list(columns), "rewards": list(first.scores), "seed": first.seed, "clips": bool(pictures.clips),
        "samples": len(first.uids) // len(set(first.uids)), "rows": rows, "sources": pictures.sources,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]  # votes belong to these very images
    return {**content, "digest": digest}


def _known(score: float) -> float | None:
    return float(f"{score:.6g}") if math.isfinite(score) else None


# ----------------------------------------------------------------------------------------------------- tables


def _results(metrics: Mapping[str, Any]) -> Table:
    """A line per reward and column but the first, or per reward if there is only one column."""
    base, others = metrics["baseline"], metrics["columns"][1:]
    if not others:
        head = [("reward", False), ("mean", True), ("95 % interval", True)]
        lines = [
            [_text(name), _figure(metrics["mean"][base][name]), _interval(metrics["interval"][base][name])]
            for name in metrics["rewards"]
        ]
        return Table(head, lines)
    head = [
        ("reward", False), ("kind", False), ("column", False), (base, True), ("mean", True), ("gain", True),
        ("95 % interval", True), ("win rate", True), ("better / worse / equal", True), ("verdict", False),
    ]  # fmt: skip
    return Table(head, [_line(metrics, name, column) for name in metrics["rewards"] for column in others])


def _line(metrics: Mapping[str, Any], name: str, column: str) -> list[Cell]:
    gain, means = metrics["gain"][column][name], metrics["mean"]
    said = verdict(gain)
    kind = said if said in ("better", "worse") else "soft"
    rate, told = gain["win_rate"], _kind(metrics, name)
    return [
        _text(name), Cell(told, told, "still"), _text(column),
        _figure(means[metrics["baseline"]][name]), _figure(means[column][name]), _figure(gain["gain"], "+", kind),
        _interval(gain["ci95"], "+"), Cell("–", "") if rate is None else Cell(f"{100 * rate:.0f} %", str(rate)),
        Cell(f"{gain['wins']} / {gain['losses']} / {gain['ties']}", str(gain["wins"] - gain["losses"])),
        Cell(said, said, f"still {kind}"),
    ]  # fmt: skip


def _monitors(metrics: Mapping[str, Any]) -> Table:
    """Diversity and monitors: a line per measure."""
    names = metrics["columns"]
    head = [("measure", False), ("kind", False), *((name, True) for name in names)]
    lines = [
        [_text(measure), _text(kind), *(_figure(metrics[key].get(name, {}).get(measure)) for name in names)]
        for key, kind in (("diversity", "diversity"), ("monitors", "hacking monitor"))
        for measure in dict.fromkeys(measure for name in names for measure in metrics[key].get(name, {}))
    ]
    return Table(head, lines)


def _settings(metrics: Mapping[str, Any]) -> Table:
    """Without the seconds: equal images give an equal page."""
    labels = {
        "num_inference_steps": "steps", "guidance_scale": "guidance scale",
        "evaluations_per_image": "evaluations per image",
    }  # fmt: skip
    head = [("column", False), *((label, True) for label in labels.values()), ("source", False)]
    lines = [
        [_text(name), *(_figure(given[key]) for key in labels), _text(str(given["source"] or "–"))]
        for name, given in metrics["settings"].items()
    ]
    return Table(head, lines)


def _kind(metrics: Mapping[str, Any], reward: str) -> str:
    return "trained" if reward in metrics["trained"] else "held out"


def verdict(gain: Mapping[str, Any]) -> str:
    """Of a gain of metrics.json, by its interval."""
    if gain["ci95"] is None:
        return "too few prompts to say" if gain["pairs"] else "no valid pair"
    return direction(gain["ci95"])


def _summary(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence per column: on which rewards it is better, worse, or not clearly either."""
    sentences = []
    for column in metrics["columns"][1:]:
        found: dict[str, list[str]] = {}
        for name in metrics["rewards"]:
            said = verdict(metrics["gain"][column][name])
            found.setdefault(said, []).append(f"{name} ({_kind(metrics, name)})")
        parts = [f"{said} on {', '.join(names)}" for said, names in sorted(found.items())]
        sentences.append(f"{column} against {metrics['baseline']}: {'; '.join(parts)}.")
    return sentences


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """What makes the figures doubtful: pairs without a score, and a trained reward that rose while a held-out one fell."""
    notes = []
    for column, gains in metrics["gain"].items():
        notes += [
            f"{name}: {gain['dropped']} of {gain['pairs'] + gain['dropped']} pairs of {column} could not be scored and are left out"
            for name, gain in gains.items()
            if gain["dropped"]
        ]
        said = {name: verdict(gain) for name, gain in gains.items()}
        fell = [name for name in said if said[name] == "worse" and name not in metrics["trained"]]
        if fell and any(said[name] == "better" for name in metrics["trained"] if name in said):
            notes.append(
                f"{column} rose on a trained reward and fell on {', '.join(fell)}: look for reward hacking below"
            )
    return notes


def _text(text: str) -> Cell:
    return Cell(text, text)


def _figure(value: float | None, sign: str = "", kind: str = "") -> Cell:
    return Cell("–", "") if value is None else Cell(figure(value, sign), repr(value), kind)


def _interval(interval: Sequence[float] | None, sign: str = "") -> Cell:
    if interval is None:
        return Cell("–", "")
    low, high = interval
    return Cell(f"{figure(low, sign)} to {figure(high, sign)}", repr(low))


def figure(value: float, sign: str = "") -> str:
    """Three digits behind the point, so that a column lines up; four digits of what is very large or small."""
    text = f"{value:{sign}.3f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:{sign}.4g}"
    return f"{value:d}" if isinstance(value, int) and not sign else text.replace("-", "−", 1) if value < 0 else text
