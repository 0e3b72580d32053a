"""An evaluation in parts: a few prompts of a model at a time, each saved once it is made, so that it goes on where it stopped.

    FOLDER/parts/COLUMN/chunk-3.safetensors  scores, pixels as a result keeps them, appearance; what decided them, as JSON
                        chunk-3.json         the seconds that it took
    FOLDER/images/COLUMN/UID-SAMPLE.png      in full resolution; of videos .webp

What a part holds depends on its own prompts only, not on how many processes make parts or which were there before.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from flowalign.data import PromptRecord, digest
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.evaluation.appearance import Appearance
from flowalign.evaluation.evaluate import EvaluationResult, generate_and_score, kept_pixels, kept_sources, made_together
from flowalign.evaluation.image_files import image_path, write_image
from flowalign.models.base import Policy, Sampling
from flowalign.storage.files import read_json, reading, write_atomic
from rewards import Reward
from rewards.remote.description import fingerprint

CHUNK = 32  # prompts in a part


@dataclass(frozen=True, eq=False)
class Column:
    """A model to measure, not yet loaded. source: where it comes from, for people. weights: what decides its images, as JSON, by
    which finished parts are recognized. rows: network rows per state. load: gives the policy, with its weights in place."""

    name: str
    source: str
    weights: dict[str, Any]
    rows: int
    load: Callable[[], Policy]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What every column is asked: prompts, rewards, and how images are made. batch_size changes speed, memory and rounding."""

    records: Sequence[PromptRecord]
    judges: Sequence[Reward]
    settings: Sampling
    seed: int
    samples_per_prompt: int
    batch_size: int

    @property
    def chunks(self) -> range:
        """The numbers of the parts."""
        return range(-(-len(self.records) // CHUNK))

    def chunk(self, number: int) -> Sequence[PromptRecord]:
        """The prompts of a part."""
        return self.records[number * CHUNK : (number + 1) * CHUNK]

    def identity(self, column: Column) -> dict[str, Any]:
        """Everything that decides what a part of the column holds, as JSON."""
        settings, size = self.settings, self.settings.size
        return {
            "prompts": digest(self.records),
            "samples per prompt": self.samples_per_prompt,
            "seed": self.seed,
            "steps": settings.num_inference_steps,
            "guidance": settings.guidance_scale,
            "size": [size.height, size.width, size.frames],
            "fps": settings.fps,
            "schedule": None if settings.schedule is None else repr(settings.schedule),
            "rewards": [[reward.name, settings_of(reward)] for reward in self.judges],
            "prompts in a part": CHUNK,
            "weights": column.weights,
        }


def settings_of(reward: Reward) -> str:
    """The same in every place. The repr of a dataclass is its settings; `==` would compare what it has loaded, too."""
    try:
        return fingerprint(reward)
    except ValueError:  # it holds what JSON cannot say
        return re.sub(r" at 0x[0-9a-f]+", "", repr(reward))


@dataclass(frozen=True, eq=False)
class Part:
    """What a part holds, the images prompt by prompt. evaluations: network rows that it took."""

    scores: dict[str, Tensor]
    pixels: Tensor
    appearance: Appearance
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Store:
    """The folder of the parts. keep_images: whether images are written in full resolution, too."""

    folder: Path
    keep_images: bool

    def path(self, column: str, number: int) -> Path:
        """The file of a part."""
        return self.folder / "parts" / column / f"chunk-{number}.safetensors"

    def images(self, column: str) -> Path:
        """The folder of a column's images."""
        return self.folder / "images" / column

    def is_done(self, measurement: Measurement, column: Column, number: int) -> bool:
        """Whether the part is there, with its images. ConfigError if one of other settings is, DamagedFile for one that cannot be
        read."""
        path = self.path(column.name, number)
        if not path.exists():
            return False
        with reading(path), safe_open(str(path), framework="pt") as file:
            former = json.loads(file.metadata()["part"])["identity"]
        now = measurement.identity(column)
        if changed := [key for key in now.keys() | former.keys() if former.get(key) != now.get(key)]:
            raise ConfigError(
                f"got another {', '.join(sorted(changed))} for the column {column.name} than that of the images in {self.folder}; "
                f"expected the same, or they would be mixed: choose another output folder, or remove {path.parent}"
            )
        return all(image.exists() for image in self._image_paths(measurement, column.name, number))

    def save(self, measurement: Measurement, column: Column, number: int, part: Part, full: Tensor) -> None:
        """Writes the images, then the part: it is there once all is. full: uint8, as they are."""
        if self.keep_images:
            for image, path in zip(full, self._image_paths(measurement, column.name, number), strict=True):
                write_image(path, image, measurement.settings.fps)
        tensors = {
            "pixels": part.pixels,
            "thumbnails": part.appearance.thumbnails,
            **{f"scores/{name}": values for name, values in part.scores.items()},
            **{f"monitors/{name}": values for name, values in part.appearance.monitors.items()},
        }
        about = {
            "identity": measurement.identity(column), "evaluations": part.evaluations, "rewards": list(part.scores),
            "monitors": list(part.appearance.monitors),
        }  # fmt: skip
        path = self.path(column.name, number)
        write_atomic(path.with_suffix(".json"), json.dumps({"seconds": part.seconds}).encode())
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomic(path, save(packed, metadata={"part": json.dumps(about)}))

    def load(self, column: str, number: int) -> Part:
        """Reads a part. DamagedFile for one that cannot be read."""
        path = self.path(column, number)
        seconds = read_json(path.with_suffix(".json")).get("seconds", torch.nan)
        with reading(path), safe_open(str(path), framework="pt") as file:
            about = json.loads(file.metadata()["part"])
            monitors = {name: file.get_tensor(f"monitors/{name}") for name in about["monitors"]}
            scores = {name: file.get_tensor(f"scores/{name}") for name in about["rewards"]}
            appearance = Appearance(monitors, file.get_tensor("thumbnails"))
            return Part(scores, file.get_tensor("pixels"), appearance, about["evaluations"], seconds)

    def _image_paths(self, measurement: Measurement, column: str, number: int) -> Iterator[Path]:
        """Of a part, prompt by prompt; none if they are not kept."""
        video = measurement.settings.size.frames > 1
        for record in measurement.chunk(number) if self.keep_images else ():
            for sample in range(measurement.samples_per_prompt):
                yield image_path(self.images(column), record.uid, sample, video=video)


Missing = list[tuple[Column, int]]


def missing_parts(store: Store, measurement: Measurement, columns: Sequence[Column]) -> Missing:
    """The parts that are still to be made. ConfigError for parts of other settings."""
    return [
        (column, number)
        for column in columns
        for number in measurement.chunks
        if not store.is_done(measurement, column, number)
    ]


def make_parts(
    store: Store, measurement: Measurement, missing: Missing, processes: Processes, *, progress: bool = True
) -> None:
    """Makes and saves the missing parts, those of a process in turn. Each process loads one policy at a time, and only those of
    which it makes parts."""
    own = missing[processes.rank :: processes.count]
    for column in dict.fromkeys(column for column, _ in own):
        numbers = [number for each, number in own if each is column]
        images = sum(len(measurement.chunk(number)) for number in numbers) * measurement.samples_per_prompt
        policy = column.load()
        with tqdm(
            total=images, desc=column.name, unit="img", dynamic_ncols=True, disable=not (progress and processes.is_main)
        ) as bar:
            for number in numbers:
                _make_part(store, measurement, column, number, policy, bar.update)
        del policy
        gc.collect()  # before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    processes.wait()


@torch.no_grad()
def _make_part(
    store: Store, measurement: Measurement, column: Column, number: int, policy: Policy, progress: Callable[[int], object]
) -> None:  # fmt: skip
    """All samples of its prompts, prompt by prompt."""
    samples, total = measurement.samples_per_prompt, len(measurement.records) * measurement.samples_per_prompt
    jobs = [(record, sample) for record in measurement.chunk(number) for sample in range(samples)]
    unit = made_together(measurement.judges, samples)
    batch_size = max(unit, measurement.batch_size // unit * unit)
    began, rows_before = time.monotonic(), policy.evaluations
    kept, full, scores = list[Tensor](), list[Tensor](), list[dict[str, Tensor]]()
    for images, scored in generate_and_score(
        policy, jobs, measurement.judges, measurement.settings, measurement.seed, batch_size, number * CHUNK * samples
    ):
        kept.append(kept_pixels(images, total))
        full.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        scores.append(scored)
        progress(len(images))
    whole = torch.cat(full)
    part = Part(
        {name: torch.cat([each[name] for each in scores]).cpu() for name in scores[0]}, torch.cat(kept),
        Appearance.of(whole), policy.evaluations - rows_before, time.monotonic() - began,
    )  # fmt: skip
    store.save(measurement, column, number, part, whole)


def read_column(store: Store, measurement: Measurement, column: str) -> tuple[EvaluationResult, Appearance]:
    """The whole result of a column of which all parts are there, in the order of EvaluationResult."""
    parts = [store.load(column, number) for number in measurement.chunks]
    samples, count = measurement.samples_per_prompt, len(measurement.records)
    order = torch.arange(count * samples).reshape(count, samples).T.flatten()
    pixels = torch.cat([part.pixels for part in parts])[order]
    result = EvaluationResult(
        uids=[record.uid for record in measurement.records] * samples,
        prompts=[record.prompt for record in measurement.records] * samples,
        scores={name: torch.cat([part.scores[name] for part in parts])[order] for name in parts[0].scores},
        pixels=pixels,
        seed=measurement.seed,
        num_inference_steps=measurement.settings.num_inference_steps,
        guidance_scale=measurement.settings.guidance_scale,
        evaluations_per_image=sum(part.evaluations for part in parts) / len(order),
        seconds=sum(part.seconds for part in parts),
        digest=digest(measurement.records),
        fps=measurement.settings.fps,
        sources=kept_sources(measurement.records, pixels.shape[-2]),
    )
    return result, Appearance.cat([part.appearance for part in parts]).rows(order)
