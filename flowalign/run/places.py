"""Where a model is: a pipeline, or a run at one of its checkpoints, written in one word.

glyphs, glyphs-4step, glyphs-1step, a diffusers folder, a hub id   a pipeline as it is
runs/a                                 what the run exports: its latest checkpoint, averaged if the run keeps an average
runs/a@40                              after iteration 40; the run keeps its last run.keep_checkpoints
runs/a@40:raw, runs/a:raw              without the average; :ema with it
base                                   beside a run: the pipeline that the first run began with
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

from flowalign.config import PolicySettings
from flowalign.data import PromptRecord
from flowalign.errors import ConfigError
from flowalign.models import Policy, Sampling, load_policy
from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.checks import check_checkpoint, check_image_size, check_sources, check_vae_tiling, path_of
from flowalign.models.sampling import shipped_sampling
from flowalign.models.shipped import SHIPPED, resolve
from flowalign.run.load import SavedRun
from flowalign.storage import checkpoint
from samplers import check_schedule

BASE = "base"
PLACE = re.compile(r"(?P<folder>.+?)(?:@(?P<step>\d+))?(?::(?P<weights>raw|ema))?")


@dataclass(frozen=True)
class Place:
    """A model that is found and not yet read. saved: of a run. sampling: how it is evaluated where nobody says; None for a
    pipeline whose own call would have to be asked."""

    text: str
    policy: PolicySettings
    sampling: Sampling | None
    saved: SavedRun | None

    @staticmethod
    def of(text: str) -> Place:
        """ConfigError for what is neither a pipeline nor a run, or a checkpoint that the run does not keep; DamagedFile for a run
        that cannot be read."""
        found = PLACE.fullmatch(text)
        folder, step, weights = (found["folder"], found["step"], found["weights"]) if found else (text, None, None)
        path = Path(folder).expanduser()
        if (path / "model_index.json").is_file() or not _is_meant_as_run(folder):
            if step is not None or weights is not None:
                raise ConfigError(f"got {text}, a checkpoint of a pipeline; expected a run folder before the sign")
            return Place(text, PolicySettings(folder), shipped_sampling(resolve(folder)), None)
        saved = SavedRun.of(
            folder, None if step is None else int(step), {"raw": False, "ema": True, None: None}[weights]
        )
        return Place(text, saved.policy, saved.sampling, saved)

    @property
    def untrained(self) -> Place:
        """The pipeline of a run, without a LoRA that the run began with."""
        return Place(BASE, self.policy, self.sampling, None)

    @property
    def source(self) -> str:
        """For people."""
        if self.saved is None:
            return self.policy.path
        return f"{self.saved.folder.name}, iteration {self.saved.step}{', average' * (self.saved.section == 'ema')}"

    @cached_property
    def weights(self) -> dict[str, Any]:
        """What decides its images, as JSON. Not kept: which revision of a hub id, and the text encoders' weights."""
        policy = self.policy
        found = {
            "pipeline": _identity(policy.path, policy.family), "dtype": policy.dtype, "vae_dtype": policy.vae_dtype,
            "negative_prompt": policy.negative_prompt, "max_sequence_length": policy.max_sequence_length,
            **({"options": policy.options} if policy.options else {}),
        }  # fmt: skip
        if policy.master_weights:
            found["products"] = "autocast"
        if policy.quantization is not None:
            found["quantization"] = policy.quantization
        if policy.vae_tiling:
            found["vae_tiling"] = True
        if self.saved is not None:
            path = self.saved.folder / "checkpoints" / f"step-{self.saved.step}"
            found["checkpoint"] = checkpoint.sha256_of(path, self.saved.section)
        return found

    def check(self, settings: Sampling) -> None:
        """ConfigError for a pipeline that is not whole, or cannot make this size on these noise levels."""
        path, family = self.policy.path, self.policy.family
        try:
            check_checkpoint(path, family)
            check_image_size(path, settings.size, family)
            check_vae_tiling(path, self.policy.vae_tiling, family)
            takes_levels = inspect_checkpoint(path, family)[1].takes_levels
            check_schedule(settings.schedule, settings.num_inference_steps, path_of(path, family), takes_levels)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.text}: {error}") from error
        own = shipped_sampling(resolve(path))
        levels = (settings.num_inference_steps, settings.schedule)
        if own is not None and own.schedule is not None and (own.num_inference_steps, own.schedule) != levels:
            raise ConfigError(
                f"got {self.text} in {levels[0]} steps on {levels[1] or 'the grid of its family'}; expected {own.num_inference_steps} on "
                f"{own.schedule}, which alone it was trained on: name it first, or evaluate it by itself"
            )

    def check_sources(self, records: Sequence[PromptRecord]) -> None:
        """ConfigError for a prompt with fewer or more source images than the model reads."""
        try:
            check_sources(self.policy.path, records, self.policy.family)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.text}: {error}") from error

    def load(self, settings: Sampling | None, device: str | torch.device) -> Policy:
        """The policy with its weights. CheckpointError for a damaged checkpoint, ConfigError for a pipeline that cannot be
        loaded."""
        if self.saved is not None:
            return self.saved.load(device)
        policy = self.policy
        try:
            return load_policy(
                policy.path, trainable="full" if policy.master_weights else "none", dtype=policy.dtype, vae_dtype=policy.vae_dtype,
                family=policy.family, quantization=policy.quantization,
                max_sequence_length=policy.max_sequence_length, options=policy.options, negative_prompt=policy.negative_prompt, device=device,
                offload=policy.offload, decode_batch=policy.decode_batch, vae_tiling=policy.vae_tiling, sampling=settings,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            raise ConfigError(f"the pipeline {policy.path} cannot be loaded: {error}") from error


def find_places(texts: Mapping[str, str]) -> dict[str, Place]:
    """The places by column; `base` is the pipeline of the first run. A pipeline beside runs multiplies as the first one does."""
    found = {name: Place.of(text) for name, text in texts.items() if text != BASE}
    run = next((place for place in found.values() if place.saved is not None), None)
    if run is None and BASE in texts.values():
        raise ConfigError(
            "got base without a run; expected a run folder, whose pipeline it is, or a pipeline by its name"
        )
    if run is None:
        return found
    return {name: run.untrained if text == BASE else _beside(found[name], run) for name, text in texts.items()}


def _beside(place: Place, run: Place) -> Place:
    if place.saved is not None:
        return place
    own = run.policy
    policy = replace(
        place.policy,
        trainable=own.trainable,
        dtype=own.dtype,
        vae_dtype=own.vae_dtype,
        quantization=own.quantization,
        vae_tiling=own.vae_tiling,
    )
    return replace(place, policy=policy)


def column_name(text: str) -> str:
    """The name of a column without one of its own: runs/a@40:raw is a@40-raw."""
    return re.sub(r"[^A-Za-z0-9._@-]", "-", text.rstrip("/").rpartition("/")[2]).strip("-.") or "model"


def _is_meant_as_run(folder: str) -> bool:
    """An existing folder, or the path of one; a hub id is two words that are no folder."""
    path = Path(folder).expanduser()
    if folder in SHIPPED:
        return False
    return path.exists() or folder.count("/") != 1 or folder.startswith((".", "/", "~", "runs/"))


def _identity(path: str, family: str | None) -> str:
    """SHA-256 of a local pipeline's configurations, and of the weights of its networks and its VAE; else the hub id."""
    folder = Path(resolve(path))
    if not folder.exists():
        return path
    _, known = inspect_checkpoint(path, family)
    weights = [
        file for name in (*known.networks, "vae") for file in folder.glob(f"{name}/*.*") if file.suffix != ".json"
    ]
    whole = sha256()
    for file in sorted([*folder.glob("**/*.json"), *weights]):
        with file.open("rb") as handle:
            whole.update(f"{file.relative_to(folder)} {file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
