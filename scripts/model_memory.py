"""What each model of configs/models needs of each card of configs/hardware, on shapes alone.

`python scripts/model_memory.py [MODEL …]` measures these models anew (without names: all, half a minute each) and writes
docs/results/model_memory.json, with what was measured, and model_memory.md, the table of it.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flowalign.config import TrainConfig, load_config
from flowalign.forecast.footprint import Footprint
from flowalign.forecast.memory import GIB, Memory, device_memory, fitting
from flowalign.forecast.recorded import RecordedFootprint
from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.storage.files import write_atomic
from flowalign.testing.shapes import SHAPES, shapes_folder

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "model_memory.json"
CARDS = ("24gb", "40gb", "80gb", "8x80gb")
DDPO = ("sd15", "sd21", "sdxl", "sdxl_turbo")  # ε- and v-models; the others are trained by Flow-GRPO
OF_VIDEOS = [
    "reward={class_path: rewards.OnFrames, init_args: {reward: rewards.JPEGCompressibility}}",
    "evaluation.rewards=[rewards.VideoStatistics]",
]
NEEDED = {  # what the model's layer says that it needs beside it
    "sdxl": ["rollout.plan.train_last=false"],
    "sdxl_turbo": ["rollout.plan.train_last=false"],
    **dict.fromkeys(("hunyuan_video", "ltx_video", "wan21_1_3b", "wan21_14b", "wan21_i2v", "wan22_5b"), OF_VIDEOS),
    **{model: [*OF_VIDEOS, "rollout.fixed_rows=false"] for model in ("wan22", "wan22_i2v")},  # two networks
}
HEAD = ("encode", "rollout", "decode", "update", "evaluation")


def layers(model: str, card: str | None) -> list[str]:
    method = "ddpo" if model in DDPO else "flow_grpo"
    names = [f"methods/{method}", f"models/{model}", "rewards/jpeg", *([] if card is None else [f"hardware/{card}"])]
    return [f"configs/{name}.yaml" for name in names]


def stand_in(model: str, folder: Path, depth: int | None = None) -> list[str]:
    """Overrides that put a checkpoint without weights in the model's place, and prompts with a source image where it reads one."""
    path = str(shapes_folder(model, folder / model, depth))
    overrides = [f"policy.path={path}"]
    if inspect_checkpoint(path)[1].source_images[0]:
        Image.new("RGB", (1024, 1024)).save(folder / "image.png")
        animals = (ROOT / "configs" / "prompts" / "animals.txt").read_text().split("\n")
        rows = [json.dumps({"prompt": animal, "image": "image.png"}) + "\n" for animal in animals if animal]
        (folder / "prompts.jsonl").write_text("".join(rows))
        overrides += [f"{key}={folder / 'prompts.jsonl'}" for key in ("prompts", "evaluation.prompts")]
    return overrides


def load(model: str, card: str | None, more: list[str]) -> TrainConfig:
    return load_config([str(ROOT / layer) for layer in layers(model, card)], [*NEEDED.get(model, []), *more])[0]


def measured(model: str) -> RecordedFootprint:
    with tempfile.TemporaryDirectory() as folder:
        config = load(model, None, stand_in(model, Path(folder)))
        return RecordedFootprint.of(Footprint(config), config)


def on_card(config: TrainConfig, footprint: RecordedFootprint) -> dict[str, Any]:
    """Whether it fits, with which switches, and GiB of each phase with them; without any where nothing helps."""
    memory, room = Memory(config, footprint, config.run.device_count or 1), device_memory(config, torch.device("cpu"))
    assert room is not None
    switches, best = fitting(memory, room) if memory.beyond(room) else ([], memory)
    peaks = {name: round(size / GIB, 1) for name, size in best.peaks.items()}
    return {"fits": not best.beyond(room), "switches": switches, "peaks": peaks, "host": round(best.host / GIB, 1)}


def command(model: str, card: str, switches: list[str]) -> str:
    """What a user types."""
    given = [each for switch in (*NEEDED.get(model, []), *switches) for each in switch.split()]
    return shlex.join(["flowalign", "train", *layers(model, card), *given])


def table(models: Mapping[str, Any]) -> str:
    lines = [
        "# Memory of each model on each card",
        "",
        "Forecast on shapes, not run on a GPU: GiB at the peak of each phase of the layer in `configs/models` (its size, its LoRA, bf16) with the "
        "layer of the card, Flow-GRPO (of ε- and v-models DDPO) and a reward that needs no device memory, after the switches of the last column. "
        "They are what `flowalign forecast` proposes. Lower bounds: see [gpu.md](../gpu.md).",
        "",
        "| model | card | " + " | ".join(HEAD) + " | main memory | switches |",
        "|---|---|" + "---:|" * (len(HEAD) + 1) + "---|",
    ]
    for model, entry in models.items():
        for card, row in entry["cards"].items():
            figures = [f"{row['peaks'][name]:.1f}" for name in HEAD] if row["fits"] else ["–"] * len(HEAD)
            said = " ".join(f"`{each}`" for each in row["switches"]) if row["fits"] else "does not fit"
            lines.append(f"| `{model}` | {card} | " + " | ".join(figures) + f" | {row['host']:.1f} | {said or '–'} |")
    return "\n".join([*lines, "", "Written by `scripts/model_memory.py`.", ""])


def main(names: list[str]) -> None:
    known = json.loads(OUTPUT.read_text())["models"] if OUTPUT.exists() else {}
    found = {}
    for model in SHAPES:
        anew = not names or model in names or model not in known
        footprint = measured(model) if anew else RecordedFootprint(**known[model]["footprint"])
        with tempfile.TemporaryDirectory() as folder:
            place = stand_in(model, Path(folder), depth=2)
            cards = {card: on_card(load(model, card, place), footprint) for card in CARDS}
        found[model] = {"footprint": asdict(footprint), "cards": cards}
    write_atomic(OUTPUT, json.dumps({"models": found}, indent=1).encode())
    write_atomic(OUTPUT.with_suffix(".md"), table(found).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
