"""The report of a run: one HTML file with everything inside, made from what the run folder holds and nothing else.

Reads config.yaml, provenance.json, metrics.jsonl, summary.json, grids/*.png with grids/grids.json and clips, trees/*.png, and
whether there is a lora/ or networks/; each may be missing. Nothing is loaded from elsewhere;
without script it shows the same, less the values under the pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign.evaluation.paired_gain import direction
from flowalign.models.load_call import IMPORTS
from flowalign.report.charts import curves, number
from flowalign.report.doubts import doubts
from flowalign.report.grids import Pair, by_number, newest_pairs
from flowalign.report.page import template
from flowalign.report.panels import health_panels, reward_panels
from flowalign.storage.files import DamagedFile, read_json, reading, write_atomic
from flowalign.storage.metrics_log import MetricsLog, Row

FOLDER = "LORA_FOLDER"  # in the lines of summary.json that load the LoRA, for the place of lora/
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
    config, gains, pairs = folder / "config.yaml", summary.get("rewards", {}), newest_pairs(folder / "grids")
    with reading(config):
        settings = config.read_text(encoding="utf-8") if config.exists() else None
    return template("flowalign.report", "report.html").render(
        name=folder.resolve().name,
        iterations=len({row["step"] for row in rows if "reward/mean" in row}),
        facts=_facts(summary, rows),
        results=_results(gains) if gains else [],
        doubts=doubts(gains, rows),
        first=summary.get("reward"),
        groups=_groups(pairs),
        moves=any(pair.clips for pair in pairs),
        tree=trees[-1].read_bytes() if (trees := by_number(folder / "trees")) else b"",
        rewards=curves({"": rows}, reward_panels(rows)),
        health=curves({"": rows}, health_panels(rows)),
        phases=_phases(rows),
        snippet=load_snippet(folder, summary["pipeline"])
        if summary and _weights(folder, summary["pipeline"])
        else None,
        provenance=_flatten(read_json(folder / "provenance.json")),
        config=settings,
    )


def load_snippet(run_folder: Path, pipeline: dict[str, Any]) -> str:
    """A Python script that makes an image, or a video, with the run's weights in plain diffusers, from any working directory;
    `pipeline` is that of summary.json."""
    arguments = {"prompt": "your prompt", **pipeline["arguments"]}
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    helpers, result = [], ".images[0]"
    keep = 'image.save("image.png")'
    if pipeline.get("source_images"):
        # Lanczos, as `fitted_images`, where the pipeline does not fit them itself
        stretched = "width" in arguments and not pipeline.get("own_fit")
        fitted = f".resize(({arguments['width']}, {arguments['height']}), resample=1)" if stretched else ""
        helpers, lines = ["load_image"], [f'    image=load_image("source.png"){fitted},', *lines]
    if "num_frames" in arguments:
        helpers, result = [*helpers, "export_to_video"], ".frames[0]"
        keep = f'export_to_video(image, "video.mp4", fps={pipeline.get("fps") or 16})'
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(name for name in IMPORTS if name in pipeline['load'])}",
            *([f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []),
            "",
            f"pipe = {pipeline['load']}",
            *pipeline["setup"],
            *_weights(run_folder.absolute(), pipeline),
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            "image = pipe(",
            *lines,
            "    generator=torch.Generator().manual_seed(0),",
            f"){result}",
            keep,
        ]
    )


def _weights(run_folder: Path, pipeline: dict[str, Any]) -> list[str]:
    """Lines that give `pipe` what the run has trained, its lora/ or networks/; none without them."""
    if (run_folder / "lora").is_dir():
        lines = pipeline.get("load_lora", [f"pipe.load_lora_weights({FOLDER})"])
        return [line.replace(FOLDER, repr(str(run_folder / "lora"))) for line in lines]
    return [
        f"pipe.{part.name} = type(pipe.{part.name}).from_pretrained({str(part)!r}, torch_dtype=pipe.{part.name}.dtype)"
        for part in sorted(run_folder.glob("networks/*"))
        if part.is_dir()
    ]


# ----------------------------------------------------------------------------------- numbers and charts


def _results(rewards: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One line per reward of the summary's table, as text."""
    return [
        {
            "name": name,
            "base": number(rewards["base"][name]),
            "tuned": number(rewards["tuned"][name]),
            "gain": number(rewards["gain"][name], "+"),
            "interval": f"{number(interval[0], '+')} to {number(interval[1], '+')}" if interval else "–",
            "verdict": direction(interval) if interval else "",
            "pairs": " / ".join(str(rewards[count][name]) for count in ("wins", "losses", "ties")),
        }
        for name, interval in rewards["gain_ci95"].items()
    ]


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs by why they are shown, in their order."""
    return {
        name: [pair for pair in pairs if pair.group == name] for name in dict.fromkeys(pair.group for pair in pairs)
    }


def _facts(summary: dict[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    facts = []
    if summary:
        facts.append(("Wall time", _duration(summary["seconds"])))
        for phase, value in summary["evaluations_per_image"].items():
            facts.append((f"Network evaluations per image, {phase}", number(value)))
        facts.append(("Largest ratio drift", number(summary["ratio_drift_max"])))
    iteration = [row["time/iteration"] for row in rows if row.get("time/iteration") is not None]
    if iteration:
        facts.append(("Seconds per iteration, mean", number(sum(iteration) / len(iteration))))
    return facts


def _phases(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """Mean seconds per phase of an iteration, as text and in percent; what the phases leave of the iteration is "other"."""
    timed = [row for row in rows if row.get("time/iteration") is not None]
    if not timed:
        return []
    means = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in timed) / len(timed) for phase in PHASES}
    means["other"] = max(0.0, sum(row["time/iteration"] for row in timed) / len(timed) - sum(means.values()))
    total = sum(means.values()) or 1.0
    return [(phase, f"{seconds:.3g} s", 100 * seconds / total) for phase, seconds in means.items()]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in content.items():
        lines += _flatten(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", str(value))]
    return lines
