"""What noise optimization found: the best noise and image of each prompt, how it went, and files and pictures of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.evaluation.evaluate import kept_sources
from flowalign.models.base import Sampling
from flowalign.models.images import Images, as_bytes, image_bytes
from flowalign.noise_optimization.objective import Trial
from flowalign.noise_optimization.picture import png, progress_figure
from flowalign.storage.files import reading, write_atomic

SHOWN = 7  # iterations of which a result keeps images
SPREAD = 3  # of a video's frames, evenly spread


@dataclass(frozen=True, eq=False)
class NoiseResult:
    """Of P prompts.

    images, first_images: of the best noise, and of the start. noise, start [P, *]: the start noise that they are made from;
    latents [P, *]: the clean latents of `images`. total, first_total [P]: the weighted sum of the rewards. best_step [P]: the
    iteration that found the best one, 0 being the start.
    history: {name: [steps, P]}, of each iteration's best candidate "total", the scores by reward, and the "norm" of its noise;
    nan where a prompt had stopped or nothing was valid. held_out: {reward: (first [P], best [P])}.
    strip: {iteration: uint8 [P, 3, h, w]}, the best images after it (of videos SPREAD frames below each other: h is theirs together).
    sources: {uid: uint8 [3, h, w']}, a prompt's source images beside each other; uids [P].
    evaluations: network rows, forwards alone; decoded: images made and scored."""

    images: Images
    first_images: Images
    noise: Tensor
    start: Tensor
    latents: Tensor
    total: Tensor
    first_total: Tensor
    best_step: Tensor
    history: dict[str, Tensor]
    held_out: dict[str, tuple[Tensor, Tensor]]
    strip: dict[int, Tensor]
    prompts: list[str]
    seed: int
    sampling: Sampling
    evaluations: int
    decoded: int
    seconds: float
    sources: dict[int, Tensor]
    uids: list[int]

    def __repr__(self) -> str:
        first, best = float(self.first_total.mean()), float(self.total.mean())
        return f"NoiseResult of {len(self.prompts)} prompts: mean total {first:.4g} → {best:.4g}"

    def save(self, folder: str | Path) -> Path:
        """Writes image.png (each prompt's own if there are several: image-0.png, …), first.png likewise, of an edit source.png, of videos
        image.mp4 and first.mp4 (to look at: the noise gives the exact pixels again), noise.safetensors (`read_noise` reads it),
        result.json (prompts, totals, history, settings) and progress.png (`plot`) into `folder`, and returns it; a result that lies
        there is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (path for name in ("image", "first", "source") for path in folder.glob(f"{name}*.*")):
            stale.unlink()
        suffix = "png" if self.images.pixels.ndim == 4 else "mp4"
        for number in range(len(self.prompts)):
            mark = f"-{number}" if len(self.prompts) > 1 else ""
            self.images[number].save(folder / f"image{mark}.{suffix}")
            self.first_images[number].save(folder / f"first{mark}.{suffix}")
            if self.sources:
                write_atomic(folder / f"source{mark}.png", image_bytes(self.sources[self.uids[number]], format="PNG"))
        tensors = {"noise": self.noise, "start": self.start, "latents": self.latents}
        write_atomic(folder / "noise.safetensors", save({name: each.contiguous() for name, each in tensors.items()}))
        write_atomic(folder / "result.json", json.dumps(self._plain(), indent=1, allow_nan=False).encode())
        write_atomic(folder / "progress.png", png(self.plot()))
        return folder

    def plot(self, prompt: int = 0) -> Figure:
        """The rewards of one prompt over the iterations, above a strip of its source image and its best images on the way, of videos
        SPREAD frames of each; matplotlib's figure."""
        total = self.history["total"]
        shown = {"total": total, **{name: each for name, each in self.history.items() if not torch.equal(each, total)}}
        shown.pop("norm")
        strip = {"source": self.sources[self.uids[prompt]]} if self.sources else {}
        strip["start"] = _frames(self.first_images.pixels)[prompt]
        strip |= {f"{step}": images[prompt] for step, images in self.strip.items()}  # numbered as the axis is
        curves = {name: values[:, prompt] for name, values in shown.items()}
        return progress_figure(self.prompts[prompt], curves, float(self.first_total[prompt]), strip)

    def _plain(self) -> dict[str, object]:
        """As JSON; null is a score that is not valid."""
        return {
            "prompts": self.prompts, "seed": self.seed, "first_total": _plain(self.first_total), "total": _plain(self.total),
            "best_step": self.best_step.tolist(),
            "held_out": {name: {"first": _plain(a), "best": _plain(b)} for name, (a, b) in self.held_out.items()},
            "evaluations": self.evaluations, "decoded": self.decoded, "seconds": self.seconds,
            "num_inference_steps": self.sampling.num_inference_steps, "guidance_scale": self.sampling.guidance_scale,
            "size": asdict(self.sampling.size), "schedule": None if self.sampling.schedule is None else str(self.sampling.schedule),
            "history": {name: [_plain(row) for row in values] for name, values in self.history.items()},
        }  # fmt: skip

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return png(self.plot())


def read_noise(folder: str | Path) -> Tensor:
    """The best noise [P, *] that `NoiseResult.save` wrote: the `start` of another call, or the `noise` of `policy.generate`.
    FileNotFoundError without one, DamagedFile for one that cannot be read."""
    path = Path(folder) / "noise.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; expected the folder of a saved result of optimize_noise")
    with reading(path):
        return load_file(path)["noise"]


@dataclass(eq=False)
class Best:
    """What the loop remembers of the n prompts of a batch, in `steps` iterations. The fields are those of NoiseResult; raised:
    the last iteration with a gain that patience counts, reference: the total from which the next one is counted."""

    first: Trial
    steps: int
    images: Tensor
    noise: Tensor
    latents: Tensor
    total: Tensor
    step: Tensor
    raised: Tensor
    reference: Tensor
    history: dict[str, Tensor]
    strip: dict[int, Tensor]

    @staticmethod
    def of(first: Trial, steps: int) -> Best:
        """Before the first iteration; first: the plain samples, whose scores it has still to see."""
        count = len(first.total)
        return Best(
            first, steps, first.images.clone(), first.noise.clone(), first.latents.clone(),
            total=torch.full((count,), torch.nan), step=torch.zeros(count, dtype=torch.long),
            raised=torch.zeros(count, dtype=torch.long), reference=torch.full((count,), -torch.inf),
            history={name: torch.full((steps, count), torch.nan) for name in ("total", *first.scores, "norm")}, strip={},
        )  # fmt: skip

    def update(self, iteration: int, rows: Tensor, trial: Trial, min_gain: float) -> None:
        """trial: the best candidate of each of the prompts `rows`."""
        values = {"total": trial.total, **trial.scores, "norm": trial.noise.flatten(1).norm(dim=1)}
        for name, each in values.items():
            self.history[name][iteration, rows] = each.float()
        better = trial.total > self.total[rows].nan_to_num(-torch.inf)
        won, source = rows[better], trial.at(better.nonzero().flatten())
        self.noise[won], self.latents[won], self.images[won] = source.noise, source.latents, source.images
        self.total[won], self.step[won] = source.total.to(self.total), iteration
        gained = won[self.total[won] > self.reference[won] + min_gain]
        self.reference[gained], self.raised[gained] = self.total[gained], iteration
        if iteration in self._shown():
            self.strip[iteration] = _frames(self.images)

    def finish(self) -> None:
        """The strip of prompts that stopped early goes on with what they found."""
        for iteration in self._shown() - set(self.strip):
            self.strip[iteration] = _frames(self.images)

    def _shown(self) -> set[int]:
        """Evenly spread iterations, the last among them."""
        return {round((number + 1) * self.steps / SHOWN) - 1 for number in range(SHOWN)} - {-1}


def joined(
    parts: Sequence[Best], held_out: Sequence[dict[str, tuple[Tensor, Tensor]]], records: Sequence[PromptRecord], seed: int,
    sampling: Sampling, evaluations: int, decoded: int, seconds: float,
) -> NoiseResult:  # fmt: skip
    """The batches of a call, one after the other."""
    prompts = [record.prompt for record in records]
    fps = sampling.fps if parts[0].images.ndim == 5 else None
    return NoiseResult(
        images=Images(torch.cat([part.images for part in parts]), prompts, fps),
        first_images=Images(torch.cat([part.first.images for part in parts]), prompts, fps),
        noise=torch.cat([part.noise for part in parts]),
        start=torch.cat([part.first.noise for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        total=torch.cat([part.total for part in parts]),
        first_total=torch.cat([part.first.total for part in parts]).float(),
        best_step=torch.cat([part.step for part in parts]),
        history={name: torch.cat([part.history[name] for part in parts], 1) for name in parts[0].history},
        held_out={
            name: (torch.cat([each[name][0] for each in held_out]), torch.cat([each[name][1] for each in held_out]))
            for name in held_out[0]
        },
        strip={step: torch.cat([part.strip[step] for part in parts]) for step in sorted(parts[0].strip)},
        prompts=prompts, seed=seed, sampling=sampling, evaluations=evaluations, decoded=decoded, seconds=seconds,
        sources=kept_sources(records, sampling.size.height), uids=[record.uid for record in records],
    )  # fmt: skip


def _plain(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _frames(images: Tensor) -> Tensor:
    """uint8 [P, 3, h, w]; of videos SPREAD of their frames, below each other."""
    if images.ndim == 5:
        spread = torch.linspace(0, images.shape[1] - 1, min(SPREAD, images.shape[1])).round().long()
        images = images[:, spread].transpose(1, 2).flatten(2, 3)
    return as_bytes(images)
