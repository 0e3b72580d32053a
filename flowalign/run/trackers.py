"""What goes to TensorBoard and Weights & Biases: rows, images of evaluations, the gains at the end."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.config import RunSettings
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.storage.files import DamagedFile, write_atomic

IMAGES = 8
# how each takes a list of arrays [H, W, 3]
IMAGE_ARGUMENTS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}}


@dataclass(frozen=True)
class Trackers:
    """Those that run.trackers names; each call does nothing without one. Every process calls, one of them writes."""

    accelerator: Accelerator

    @staticmethod
    def of(accelerator: Accelerator, settings: RunSettings, folder: Path) -> Trackers:
        """Starts them. A resumed run goes on as the same Weights & Biases run, whose id is kept in the folder."""
        options: dict[str, Any] = {}
        if "wandb" in settings.trackers and accelerator.is_main_process:
            options["wandb"] = {
                "name": settings.name, "tags": settings.tags, "id": wandb_id(folder), "resume": "allow", "dir": str(folder)
            }  # fmt: skip
        accelerator.init_trackers(settings.project, init_kwargs=options)
        return Trackers(accelerator)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """The finite numbers of a row of metrics.jsonl."""
        self.accelerator.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def images(self, step: int, base: EvaluationResult, tuned: EvaluationResult) -> None:
        """The first images of an evaluation, base left and tuned right, in the order of the prompts."""
        pairs = torch.cat([base.first_frames[:IMAGES], tuned.first_frames[:IMAGES]], dim=-1)
        pixels = pairs.permute(0, 2, 3, 1).numpy()
        for tracker in self.accelerator.trackers:
            tracker.log_images({"eval/base_tuned": pixels}, step=step, **IMAGE_ARGUMENTS.get(tracker.name, {}))

    def gains(self, step: int, rewards: Mapping[str, Mapping[str, Any]]) -> None:
        """The summary's table of gains, as final/base/NAME, final/tuned/NAME, final/gain/NAME and the interval's two ends."""
        values = {f"final/{key}/{name}": v for key in ("base", "tuned", "gain") for name, v in rewards[key].items()}
        for name, interval in rewards["gain_ci95"].items():
            for end, value in zip(("low", "high"), interval or (), strict=False):
                values[f"final/gain_ci95_{end}/{name}"] = value
        self.row(step, values)


def wandb_id(folder: Path) -> str:
    """The id of the folder's Weights & Biases run, made at the first start. DamagedFile for a file that holds none."""
    file = folder / "wandb_id.txt"
    if not file.exists():
        write_atomic(file, uuid.uuid4().hex[:12].encode())
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFile(
            f"{file} cannot be read ({error}): remove it to begin another run of Weights & Biases"
        ) from error
    if not re.fullmatch(r"[0-9a-f]{12}", text):
        raise DamagedFile(f"{file} holds no id of a run: remove it to begin another run of Weights & Biases")
    return text
