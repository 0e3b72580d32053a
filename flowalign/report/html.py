"""The report of a run: one HTML file with everything inside, made from what the run folder holds and nothing else.

Reads config.yaml, provenance.json, metrics.jsonl, summary.json, grids/*.png with grids/grids.json, trees/*.png, and
whether there is a lora/ or networks/; each may be missing. No script, nothing loaded from elsewhere.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from flowalign.report.charts import Panel, bars, curves
from flowalign.report.doubts import doubts
from flowalign.report.grids import Pair, by_number, newest_pairs
from flowalign.storage.files import DamagedFile, read_json, reading, write_atomic
from flowalign.storage.metrics_log import MetricsLog, Row

HEALTH = (
    Panel("Ratio drift on replay (largest)", "ratio/drift_max", log=True),
    Panel("Clipped edges (fraction)", "ratio/clip_fraction"),
    Panel("Approximate KL to the rollout policy", "ratio/approx_kl", log=True),
    Panel("KL loss to the reference", "loss/kl", log=True),
    Panel("Gradient norm", "optim/grad_norm", log=True),
    Panel("Groups with equal rewards (fraction)", "group/zero_std_ratio"),
    Panel("Policy loss", "loss/policy"),
    Panel("Learning rate", "optim/lr"),
)
PHASES = ("rollout", "decode", "reward", "update")


def write_report(run_folder: Path) -> Path:
    """Writes report.html into the run folder and returns its path. Works on a run that has only just begun.

    Raises DamagedFile naming the file if one that exists is damaged, FileNotFoundError without a folder."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no run folder {folder} (working directory: {Path.cwd()}); expected one that a run wrote"
        )
    rows = MetricsLog(folder / "metrics.jsonl").rows()
    summary = read_json(folder / "summary.json")
    try:
        page = _page(folder, summary, rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(
            f"got summary.json, metrics.jsonl or grids/grids.json in {folder} without what a run writes there ({error!r}); "
            "expected those of a run of this version: remove them to have a report without results"
        ) from error
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _page(folder: Path, summary: dict[str, Any], rows: Sequence[Row]) -> str:
    config, gains = folder / "config.yaml", summary.get("rewards", {})
    with reading(config):
        settings = config.read_text(encoding="utf-8") if config.exists() else None
    return template("flowalign.report", "report.html").render(
        name=folder.resolve().name,
        iterations=len({row["step"] for row in rows if "reward/mean" in row}),
        facts=_facts(summary, rows),
        results=_results(gains) if gains else [],
        doubts=doubts(gains, rows),
        first=summary.get("reward"),
        groups=_groups(newest_pairs(folder / "grids")),
        tree=trees[-1].read_bytes() if (trees := by_number(folder / "trees")) else b"",
        rewards=curves(rows, reward_panels(rows)),
        health=curves(rows, health_panels(rows)),
        phases=_phase_bars(rows),
        snippet=load_snippet(folder, summary["pipeline"]) if summary and _weights(folder) else None,
        provenance=_flatten(read_json(folder / "provenance.json")),
        config=settings,
    )


def load_snippet(run_folder: Path, pipeline: dict[str, Any]) -> str:
    """A Python script that makes an image with the run's weights in plain diffusers, from any working directory; `pipeline` is
    that of summary.json."""
    arguments = {"prompt": "your prompt", **pipeline["arguments"]}
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = {pipeline['load']}",
            *pipeline["setup"],
            *_weights(run_folder.absolute()),
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            "image = pipe(",
            *(f"    {name}={value!r}," for name, value in arguments.items()),
            "    generator=torch.Generator().manual_seed(0),",
            ").images[0]",
            'image.save("image.png")',
        ]
    )


def _weights(run_folder: Path) -> list[str]:
    """Lines that give `pipe` what the run has trained, its lora/ or networks/; none without them."""
    if (run_folder / "lora").is_dir():
        return [f"pipe.load_lora_weights({str(run_folder / 'lora')!r})"]
    return [
        f"pipe.{part.name} = type(pipe.{part.name}).from_pretrained({str(part)!r}, torch_dtype=pipe.{part.name}.dtype)"
        for part in sorted(run_folder.glob("networks/*"))
        if part.is_dir()
    ]


def template(package: str, name: str) -> jinja2.Template:
    """A page of the package, whose pictures are written into it: `{{ … | svg_url }}`, `{{ … | png_url }}`."""
    source = (files(package) / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["png_url"] = lambda data: _data_url("png", data)
    environment.filters["svg_url"] = lambda svg: _data_url("svg+xml", svg.encode())
    return environment.from_string(source)


# ----------------------------------------------------------------------------------- numbers and charts


def _results(rewards: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One line per reward of the summary's table, as text."""
    return [
        {
            "name": name,
            "base": _number(rewards["base"][name]),
            "tuned": _number(rewards["tuned"][name]),
            "gain": _number(rewards["gain"][name], "+"),
            "interval": f"{_number(interval[0], '+')} to {_number(interval[1], '+')}" if interval else "–",
            "verdict": _verdict(interval) if interval else "",
            "pairs": " / ".join(str(rewards[count][name]) for count in ("wins", "losses", "ties")),
        }
        for name, interval in rewards["gain_ci95"].items()
    ]


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs by why they are shown, in their order."""
    return {
        name: [pair for pair in pairs if pair.group == name] for name in dict.fromkeys(pair.group for pair in pairs)
    }


def _verdict(interval: Sequence[float]) -> str:
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no clear change"


def _facts(summary: dict[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    facts = []
    if summary:
        facts.append(("Wall time", _duration(summary["seconds"])))
        for phase, value in summary["evaluations_per_image"].items():
            facts.append((f"Network evaluations per image, {phase}", _number(value)))
        facts.append(("Largest ratio drift", _number(summary["ratio_drift_max"])))
    iteration = [row["time/iteration"] for row in rows if row.get("time/iteration") is not None]
    if iteration:
        facts.append(("Seconds per iteration, mean", _number(sum(iteration) / len(iteration))))
    return facts


def reward_panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel per training reward, before them all rewards together unless there is only one, then the held-out ones."""
    keys = dict.fromkeys(key for row in rows for key in row)  # in the order of their first appearance
    names = [key[len("reward/") : -len("_mean")] for key in keys if re.fullmatch(r"reward/.+_mean", key)]
    panels = [Panel(name, f"reward/{name}_mean", f"reward/{name}_std") for name in names]
    together = [] if len(panels) == 1 else [Panel("All rewards together", "reward/mean")]
    held_out = [Panel(f"Held-out {key[len('eval/') :]}", key) for key in keys if key.startswith("eval/")]
    return [*together, *panels, *held_out]


def health_panels(rows: Sequence[Row]) -> list[Panel]:
    """HEALTH, then a panel for every other metric that a trainer or a process reward measured."""
    known = {panel.key for panel in HEALTH}
    keys = dict.fromkeys(key for row in rows for key in row if key not in known)
    elsewhere = ("time/", "cost/", "reward/", "eval/", "ratio/drift_step_")
    return [*HEALTH, *(Panel(key, key) for key in keys if "/" in key and not key.startswith(elsewhere))]


def _phase_bars(rows: Sequence[Row]) -> str:
    """Mean seconds per phase of an iteration; what the phases leave of the iteration is "other"."""
    timed = [row for row in rows if row.get("time/iteration") is not None]
    if not timed:
        return ""
    means = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in timed) / len(timed) for phase in PHASES}
    other = sum(row["time/iteration"] for row in timed) / len(timed) - sum(means.values())
    means["other"] = max(0.0, other)
    return bars(list(means), list(means.values()), "s")


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None or not math.isfinite(value) else re.sub("^-", "−", f"{value:{sign}.4g}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in content.items():
        lines += _flatten(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return lines


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
