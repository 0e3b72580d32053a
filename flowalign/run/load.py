"""A run folder read again: its policy at one of its checkpoints."""

from __future__ import annotations

from argparse import ArgumentError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser

from flowalign.build import from_settings
from flowalign.config import EvaluationSettings, PolicySettings
from flowalign.config.parser import own_rules
from flowalign.errors import ConfigError
from flowalign.models import Policy
from flowalign.models.base import Sampling
from flowalign.run.folder import run_folder
from flowalign.storage import checkpoint
from flowalign.storage.files import reading
from flowalign.storage.named_tensors import restore_parameters
from rewards import Reward
from samplers import Schedule

Kind = TypeVar("Kind")

WEIGHTS = {"lora": "lora", "full": "networks"}  # policy.trainable -> the folder, inside a run's, of what is trained


def save_weights(policy: Policy, trainable: str, folder: Path, *, write: bool = True) -> None:
    """What is trained, for plain diffusers. write: whether this process does; sharded weights are gathered by all."""
    if trainable != "lora":
        policy.save_networks(folder, write)
    elif write:
        policy.save_lora(folder)


@dataclass(frozen=True)
class Generation:
    """What of a run's configuration decides the images that its policy makes."""

    policy: PolicySettings
    num_inference_steps: int
    guidance_scale: float
    schedule: Schedule | None


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run, found and not yet read. section: of the checkpoint, the weights or their average. usual: whether
    it is what the run itself exports, the latest, averaged if the run keeps an average."""

    folder: Path
    policy: PolicySettings
    sampling: Sampling
    step: int
    section: str
    usual: bool

    @staticmethod
    def of(place: str | Path, step: int | None = None, ema: bool | None = None) -> SavedRun:
        """step: None is the latest. ema: None is as the run evaluates. ConfigError for what the folder does not hold; DamagedFile
        for a config.yaml that cannot be read."""
        folder = run_folder(place)
        generation, averaged = _read_config(folder / "config.yaml")
        steps = checkpoint.steps(folder)
        if not steps:
            raise ConfigError(f"got {folder}, which holds no checkpoint yet; expected a run that has saved one")
        if step is not None and step not in steps:
            raise ConfigError(f"got step {step} of {folder}; expected one of those that it keeps: {steps}")
        if ema and not averaged:
            raise ConfigError(f"got ema=true for {folder}, which keeps no average (run.ema_decay=null); leave it out")
        policy = replace(
            generation.policy, roles={}, lora=replace(generation.policy.lora, init=None), gradient_checkpointing=False,
            compile=False, attention=None,
        )  # fmt: skip
        sampling = Sampling(
            generation.num_inference_steps, generation.guidance_scale, policy.size, generation.schedule, policy.fps
        )
        section = "ema" if (averaged if ema is None else ema) else "role_policy"
        usual = step in (None, steps[-1]) and section == ("ema" if averaged else "role_policy")
        return SavedRun(folder, policy, sampling, step or steps[-1], section, usual)

    @property
    def weights_folder(self) -> Path:
        """Where an export goes: the run's own lora/ (networks/ of full weights), or beside it for another step or without the
        average."""
        name = WEIGHTS[self.policy.trainable]
        return self.folder / (name if self.usual else f"{name}-step-{self.step}{'-ema' * (self.section == 'ema')}")

    def load(self, device: str | torch.device = "cpu") -> Policy:
        """The policy with the weights of the checkpoint. CheckpointError for a damaged one, ConfigError for a
        pipeline that cannot be loaded."""
        path = self.folder / "checkpoints" / f"step-{self.step}"
        tensors, _ = checkpoint.load(path, [self.section])
        policy = from_settings(self.policy, self.sampling, device)
        restore_parameters(policy.parameters_of("policy"), tensors[self.section])
        return policy


def load_run(
    folder: str | Path, *, step: int | None = None, ema: bool | None = None, device: str | torch.device = "cpu"
) -> Policy:
    """The policy that a run trained; it generates and evaluates with the run's own settings (`policy.sampling`).

    Everything but the weights comes from the folder's config.yaml, whose relative paths start from the working directory.
    step: of the checkpoints that the run keeps, None the latest. ema: whether the weights are the run's moving average, None:
    if it keeps one. The run's roles are not loaded. Raises ConfigError for what the folder does not hold, CheckpointError or
    DamagedFile for what is damaged."""
    return SavedRun.of(folder, step, ema).load(device)


@dataclass(frozen=True)
class Judged:
    """What of a run's configuration decides how it is scored: what it trains on, and how it is evaluated."""

    reward: Reward
    evaluation: EvaluationSettings


def read_judged(run: Path) -> Judged:
    """Of a run folder. ConfigError for rewards that cannot be imported, DamagedFile for a config.yaml that cannot be read."""
    path = run / "config.yaml"
    with reading(path):
        plain = _read_yaml(path)
        content = {key: plain[key] for key in ("reward", "evaluation")}
        try:
            return _made(Judged, content)
        except ValueError as error:
            raise ConfigError(f"{path}: the rewards of the run cannot be made ({error})") from error


def _read_config(path: Path) -> tuple[Generation, bool]:
    """And whether the run keeps an average."""
    with reading(path):
        plain = _read_yaml(path)
        schedule = plain["evaluation"]["schedule"] or plain["rollout"]["schedule"]
        content = {
            "policy": plain["policy"],
            "schedule": schedule,
            **{key: plain["evaluation"][key] for key in ("num_inference_steps", "guidance_scale")},
        }
        return _made(Generation, content), plain["run"]["ema_decay"] is not None


def _made(kind: type[Kind], content: dict[str, Any]) -> Kind:
    """ValueError for content that does not make one."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False, fail_untyped=True)
    try:
        with own_rules():
            return kind(**parser.instantiate(parser.parse_object(content)).as_dict())
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
