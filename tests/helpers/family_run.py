"""Runs and policies of the tiny pipelines, of any family alike."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config import TrainConfig, load_config
from flowalign.loop import train
from flowalign.models import LoRA, Policy, Sampling, path_of
from flowalign.models.checks import guidance_of
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows
from rewards import FunctionReward
from tests.helpers.families import Subject

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "tests" / "data" / "family.yaml")
LEVELS = (1.0, 0.5)  # at which velocities are compared; of numbers that bf16 has, times 1000 too
SMALL = LoRA(rank=2, alpha=3)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def brightness_of_videos(prompts: list[str], videos: Tensor) -> Tensor:
    return videos.mean((1, 2, 3, 4))


def reward_arguments(family: Subject) -> dict[str, Any]:
    """Of a FunctionReward with a gradient to the pixels."""
    function, what = (brightness_of_videos, "videos") if family.size.frames > 1 else (brightness, "images")
    return {"path": f"{__name__}:{function.__name__}", "inputs": [what], "differentiable": True}


def reward_of(family: Subject) -> FunctionReward:
    return FunctionReward(**reward_arguments(family))


# ------------------------------------------------------------------------------------------ runs


def arguments(family: Subject, output: Path) -> list[str]:
    """What family.yaml leaves open."""
    size, video, scale = family.size, family.size.frames > 1, scale_of(family)
    reward = json.dumps({"class_path": "rewards.FunctionReward", "init_args": reward_arguments(family)})
    rows = [{"prompt": record.prompt, "images": [str(path) for path in record.images]} for record in family.records(2)]
    prompts = output / "prompts.json"
    prompts.write_text(json.dumps(rows))
    return [
        f"run.output={output}", f"prompts={prompts}", f"evaluation.prompts={prompts}", f"reward={reward}",
        f"evaluation.rewards=[{reward}]", f"policy.path={family.folder}", f"policy.height={size.height}",
        f"policy.width={size.width}", f"policy.frames={size.frames}",
        f"rollout.guidance_scale={scale}", f"evaluation.guidance_scale={scale}", *(["policy.fps=8"] if video else []),
    ]  # fmt: skip


def scale_of(family: Subject) -> float:
    """Of the guidance, 1 where the model ignores it."""
    return 1.0 if guidance_of(family.folder) == "none" else 3.0


def stochastic(family: Subject) -> str:
    """The setting of the kernel that draws noise on the family's path."""
    return f"rollout.kernel=samplers.{'FlowSDE' if path_of(family.folder).rectified else 'DDIM'}"


def configured(
    family: Subject, output: Path, *overrides: str, layers: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, Any]]:
    """What `train` takes. layers: files of configs/ over family.yaml."""
    files = [CONFIG, *(str(ROOT / "configs" / layer) for layer in layers)]
    return load_config(files, [*arguments(family, output), *overrides])


def trained(
    family: Subject, output: Path, *overrides: str, layers: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Runs it to its end: the last row of its metrics, and the policy's final weights."""
    train(*configured(family, output, "run.name=tiny", *overrides, layers=layers))
    tensors, _ = checkpoint.load(checkpoint.latest(output / "tiny"))
    return read_rows(output / "tiny" / "metrics.jsonl")[-1], tensors["role_policy"]


# ------------------------------------------------------------------------------------------ policies


def shaken(policy: Policy, seed: int = 0) -> Policy:
    """With adapters that do something: B starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.trainable_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def velocity(family: Subject, policy: Policy, guidance: float = 3.0) -> Tensor:
    """At two states on the path's levels, one for each of two records."""
    sigma = torch.tensor(LEVELS)
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(len(sigma), *policy.latent_shape(family.size), generator=noise)
    negative = policy.rows_per_state(guidance) > 1
    conditions = policy.encode(family.records(len(sigma)), negative=negative, size=family.size)
    return policy.velocity(x, sigma, conditions, guidance_scale=guidance)


def gradient(family: Subject, policy: Policy, guidance: float = 3.0) -> dict[str, Tensor]:
    """Of the mean square of `velocity`; zeros of what it does not reach."""
    names, parameters = zip(*policy.trainable_parameters(), strict=True)
    loss = velocity(family, policy, guidance).square().mean()
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def sampling_of(family: Subject, guidance: float = 3.0) -> Sampling:
    return Sampling(2, guidance, family.size, fps=8 if family.size.frames > 1 else None)
