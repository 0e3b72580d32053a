"""A policy gradient on a tiny pipeline: two prompts, LoRA with weights other than 0, brightness as the reward."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flowalign.advantage import Normalized
from flowalign.data import PromptRecord
from flowalign.models import LoRA, Size, load_policy
from flowalign.objectives import ClippedRatio
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import PolicyGradient, Signal
from rewards import RewardOutput, RewardSpec
from samplers import FlowSDE


@dataclass(frozen=True)
class Brightness:
    """Mean pixel value: differs between any two images."""

    name: str = "brightness"
    spec = RewardSpec()

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch) -> RewardOutput:
        scores = batch.images.mean((1, 2, 3))
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


PROMPTS = [PromptRecord(i, f'the word "{w}" in red on a yellow background') for i, w in enumerate(["KITE", "MOON"])]


def make(
    pipeline: Path, plan, kernel=None, group_size: int = 3, steps: int = 4, guidance: float = 1.0, reward=None,
    detach_uncond: bool = False, fixed_rows: int | None = None, load: dict | None = None, **parts,
):  # fmt: skip
    """The policy, and its trainer, prepared. load: of load_policy. fixed_rows: all micro-batches then have this size."""
    torch.manual_seed(0)
    policy = load_policy(
        str(pipeline), lora=LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2")), fixed_rows=fixed_rows,
        **(load or {}),
    )  # fmt: skip
    for name, parameter in policy.trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    own = {name: parts.pop(name) for name in ("credit", "select") if name in parts}
    signal = Signal(parts.pop("advantage", Normalized()), **own)
    parts = {"objective": ClippedRatio(1e-2), **({"micro_batch": fixed_rows} if fixed_rows else {}), **parts}
    trainer = PolicyGradient(signal, **parts)
    settings = Rollout(
        plan, kernel or FlowSDE(), groups=2, group_size=group_size, num_inference_steps=steps, guidance_scale=guidance,
        detach_uncond=detach_uncond, micro_batch=fixed_rows or 64, fixed_rows=fixed_rows is not None,
    )  # fmt: skip
    trainer.prepare(Task(policy, reward or Brightness(), settings, 0, Size(24, 48)), None)
    return policy, trainer


def gradients(policy) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in policy.trainable_parameters() if p.grad is not None}
    for _, parameter in policy.trainable_parameters():
        parameter.grad = None
    return found


def run_updates(trainer, batch) -> None:
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        update.after()
