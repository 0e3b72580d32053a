"""The report of a run: one HTML file with everything inside, made from what the run folder holds and nothing else.

Reads config.yaml, provenance.json, metrics.jsonl, summary.json, grids/*.png with grids/grids.json, trees/*.png, and
whether there is a lora/; each may be missing. No script, nothing loaded from elsewhere.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.charts import Panel, bars, curves
from flowalign.files import write_atomic
from flowalign.metrics import Row, read_rows

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

    Raises ValueError naming the file if one that exists is damaged, FileNotFoundError without a folder."""
    folder = Path(run_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run folder {folder} (working directory: {Path.cwd()})")
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    summary = _read_json(folder / "summary.json")
    config = folder / "config.yaml"
    page = _template().render(
        name=folder.resolve().name,
        iterations=len({row["step"] for row in rows if "reward/mean" in row}),
        facts=_facts(summary, rows),
        results=_results(summary),
        pairs=_last_grid(folder / "grids"),
        tree=_data_url("png", trees[-1].read_bytes()) if (trees := _by_number(folder / "trees")) else "",
        rewards=_inline_svg(curves(rows, _reward_panels(rows))),
        health=_inline_svg(curves(rows, HEALTH)),
        phases=_inline_svg(_phase_bars(rows)),
        snippet=load_snippet(folder, summary.get("pipeline")) if (folder / "lora").is_dir() else None,
        provenance=_flatten(_read_json(folder / "provenance.json")),
        config=config.read_text() if config.exists() else None,
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def load_snippet(run_folder: Path, pipeline: dict[str, Any] | None) -> str:
    """Python that loads the run's LoRA into plain diffusers.

    `pipeline` is {"path": …, "setup": [lines of Python], "arguments": {num_inference_steps, guidance_scale, height,
    width, …}}, as summary.json holds it; without it the reader is sent to config.yaml."""
    path, after = (repr(pipeline["path"]), "") if pipeline else ("...", "  # the model named in config.yaml")
    arguments = {"prompt": "your prompt", **(pipeline or {}).get("arguments", {})}
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({path}){after}",
            *(pipeline or {}).get("setup", []),
            f"pipe.load_lora_weights({str(Path(run_folder) / 'lora')!r})",
            "image = pipe(",
            *lines,
            "    generator=torch.Generator().manual_seed(0),",
            ").images[0]",
        ]
    )


def _template() -> jinja2.Template:
    source = (files("flowalign") / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object; restore or remove it")
    return content


# ----------------------------------------------------------------------------------- numbers and charts


def _results(summary: dict[str, Any]) -> list[dict[str, str]]:
    """One line per reward of the summary table, as text.

    `rewards` of the summary is {base: {reward: value}, …}; without it these keys stand in the summary itself."""
    whole = summary.get("rewards", summary)
    base, tuned, intervals = (
        _per_reward(whole.get(key), summary.get("reward", "reward")) for key in ("base", "tuned", "gain_ci95")
    )
    lines = []
    for name in tuned or base:
        before, after, interval = base.get(name), tuned.get(name), intervals.get(name)
        gain = None if before is None or after is None else after - before
        verdict = (
            ""
            if interval is None
            else "better"
            if interval[0] > 0
            else "worse"
            if interval[1] < 0
            else "no clear change"
        )
        lines.append(
            {
                "name": name,
                "base": _number(before),
                "tuned": _number(after),
                "gain": _number(gain, "+"),
                "interval": f"{_number(interval[0], '+')} to {_number(interval[1], '+')}" if interval else "–",
                "verdict": verdict,
            }
        )
    return lines


def _per_reward(value: Any, name: str) -> dict[str, Any]:
    """A run of one reward may write plain values in place of {reward: value}."""
    return value if isinstance(value, dict) else {} if value is None else {name: value}


def _facts(summary: dict[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    facts = []
    if summary.get("seconds") is not None:
        facts.append(("Wall time", _duration(summary["seconds"])))
    for key, value in (summary.get("evaluations_per_image") or {}).items():
        facts.append((f"Network evaluations per image, {key}", _number(value)))
    drift = summary.get("ratio_drift_max")
    if drift is not None:
        facts.append(("Largest ratio drift", _number(drift)))
    iteration = [row["time/iteration"] for row in rows if row.get("time/iteration") is not None]
    if iteration:
        facts.append(("Seconds per iteration, mean", _number(sum(iteration) / len(iteration))))
    return facts


def _reward_panels(rows: Sequence[Row]) -> list[Panel]:
    keys = dict.fromkeys(key for row in rows for key in row)  # in the order of their first appearance
    names = [key[len("reward/") : -len("_mean")] for key in keys if re.fullmatch(r"reward/.+_mean", key)]
    panels = [Panel(name, f"reward/{name}_mean", f"reward/{name}_std") for name in names]
    together = [] if len(panels) == 1 else [Panel("All rewards together", "reward/mean")]
    held_out = [Panel(f"Held-out {key[len('eval/') :]}", key) for key in keys if key.startswith("eval/")]
    return [*together, *panels, *held_out]


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


# ------------------------------------------------------------------------------------------------ grids


@dataclass(frozen=True)
class Pair:
    """Two images as data URLs and the lines below them; `tuned` is "" where the picture is one whole grid."""

    base: str
    tuned: str
    caption: list[str]


def grid(images_base: Tensor, images_tuned: Tensor, captions: Sequence[str], path: Path) -> Path:
    """Draws pairs, base left and tuned right, with their captions into one PNG, and enters it into grids.json.

    images [k, 3, H, W] in [0, 1]; captions [k], lines parted by newlines. Tiny images are enlarged by a whole factor
    without smoothing, those above 512 pixels reduced by one. Both files are written atomically."""
    if images_base.shape != images_tuned.shape or len(images_base) != len(captions) or not captions:
        raise ValueError(
            f"grid got images {list(images_base.shape)} and {list(images_tuned.shape)} and {len(captions)} captions; "
            "expected equal shapes [k, 3, H, W] and k >= 1 captions"
        )
    lefts, rights = ([_tile(image) for image in images] for images in (images_base, images_tuned))
    width, height = lefts[0].size
    gap, line, font = 12, 17, ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 13)
    texts = [_wrap(caption, font, 2 * width + 4) for caption in captions]
    columns = max(1, min(len(captions), 1240 // (2 * width + 4 + 2 * gap)))
    cell = (2 * width + 4 + 2 * gap, height + gap + line * (1 + max(len(text) for text in texts)) + gap)
    canvas = Image.new("RGB", (columns * cell[0], math.ceil(len(captions) / columns) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    entries = []
    for number, (left, right, text) in enumerate(zip(lefts, rights, texts, strict=True)):
        x, y = (number % columns) * cell[0] + gap, (number // columns) * cell[1] + gap
        boxes = {"base": (x, y + line, width, height), "tuned": (x + width + 4, y + line, width, height)}
        for (name, box), tile in zip(boxes.items(), (left, right), strict=True):
            draw.text((box[0], y - 1), name, fill="#52606d", font=font)
            canvas.paste(tile, box[:2])
            draw.rectangle((box[0] - 1, box[1] - 1, box[0] + width, box[1] + height), outline="#d9dee4")
        draw.multiline_text((x, y + line + height + 3), "\n".join(text), fill="#1f2933", font=font, spacing=3)
        entries.append({"caption": captions[number], **{name: list(box) for name, box in boxes.items()}})
    write_atomic(path, _png(canvas))
    index = path.parent / "grids.json"
    write_atomic(index, json.dumps({**_read_json(index), path.name: entries}, indent=1).encode())
    return path


def _tile(image: Tensor) -> Image.Image:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    longer = max(tile.size)
    if longer > 512:
        return tile.reduce(math.ceil(longer / 512))
    factor = max(1, 288 // longer)
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    letters = max(8, int(width / font.getlength("n")))
    return [piece for line in caption.split("\n") for piece in textwrap.wrap(line, letters) or [""]]


def _last_grid(folder: Path) -> list[Pair]:
    """The pairs of the newest grid (by the numbers in its name), cut out of the PNG; empty without a grid."""
    pictures = _by_number(folder)
    if not pictures:
        return []
    entries = _read_json(folder / "grids.json").get(pictures[-1].name)
    with Image.open(pictures[-1]) as picture:
        picture.load()
        if entries is None:  # drawn by someone else: shown whole
            return [Pair(_data_url("png", _png(picture)), "", [pictures[-1].name])]
        return [Pair(_cut(picture, e["base"]), _cut(picture, e["tuned"]), e["caption"].split("\n")) for e in entries]


def _by_number(folder: Path) -> list[Path]:
    """The PNGs of a folder by the numbers in their names, the newest last."""
    return sorted(folder.glob("*.png"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])


def _cut(picture: Image.Image, box: list[int]) -> str:
    x, y, width, height = box
    return _data_url("png", _png(picture.crop((x, y, x + width, y + height))))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _inline_svg(svg: str) -> str:
    return _data_url("svg+xml", svg.encode()) if svg else ""


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
