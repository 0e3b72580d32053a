"""Checks of the network: adapters, modes, dtypes, parity with the pipeline, conditions, roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from flowalign.config import PolicySettings
from flowalign.data import PromptRecord
from flowalign.diagnostics.doctor.base import Finding
from flowalign.diagnostics.measure import distance
from flowalign.models import Policy, Sampling, check_lora_targets
from flowalign.models.checkpoints import inspect_checkpoint
from flowalign.models.grid import grid, pipeline_call, pipeline_latents
from flowalign.models.load import read_pipeline
from flowalign.models.sampling import sample
from flowalign.rollouts.task import Task
from samplers import normal


def rounding(settings: PolicySettings, exact: float) -> float:
    """The relative difference allowed between two orders of the same arithmetic: `exact` in fp32 on the CPU (where an
    invariant says so), 1e-2 in fp32 elsewhere (TF32, three bits more than bf16), 5e-2 in bf16."""
    if settings.dtype == "bf16":
        return 5e-2
    return 1e-2 if torch.cuda.is_available() else exact


def relative(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def check_adapters(policy: Policy, settings: PolicySettings) -> Finding:
    """Which layers the LoRA sits on, and that all of it, and nothing else, is trained."""
    named = policy.trainable_parameters()
    total = sum(parameter.numel() for _, parameter in named)
    figure = f"{total:,} parameters in {len(named)} tensors are trained"
    if not named:
        return Finding(
            "adapters", False, figure, "nothing is trainable: check policy.trainable and policy.lora.targets"
        )
    networks = policy.modules().values()
    if settings.trainable == "full":
        frozen = sum(not parameter.requires_grad for network in networks for parameter in network.parameters())
        advice = (
            f"{frozen} tensors of the network are frozen: let policy.trainable=full train them all" if frozen else ""
        )
        return Finding("adapters", not frozen, f"{figure}, full weights", advice)
    _, family = inspect_checkpoint(settings.path, settings.family)
    targets = family.targets if settings.lora.targets is None else settings.lora.targets
    counts = {target: len(check_lora_targets(settings.path, [target], settings.family)) for target in targets}
    expected = len(check_lora_targets(settings.path, targets, settings.family))
    layers = [module for network in networks for module in network.modules() if isinstance(module, BaseTunerLayer)]
    figure += f" at {len(layers)} layers ({', '.join(f'{name} {count}' for name, count in counts.items())})"
    frozen_adapters = sum(not parameter.requires_grad for _, parameter in named)
    other = [
        name for network in networks for name, p in network.named_parameters()
        if p.requires_grad and "lora_" not in name
    ]  # fmt: skip
    if frozen_adapters:
        advice = f"{frozen_adapters} adapter tensors are frozen: do not switch requires_grad, use policy.role for reference passes"
    elif other:
        advice = f"{other[0]} and {len(other) - 1} more are trained beside the LoRA: freeze the base network"
    elif len(layers) != expected:
        advice = f"{expected} layers were asked for by policy.lora.targets: load the adapter on all of them"
    else:
        advice = ""
    return Finding("adapters", not advice, figure, advice)


def check_modes(policy: Policy) -> Finding:
    """No dropout, no train mode: the update must see the velocity of the rollout. (Layers that peft adds are in train mode;
    that matters only for layers that behave differently in it.)"""
    networks = policy.modules()
    parts = [(f"{key}.{name}", part) for key, network in networks.items() for name, part in network.named_modules()]
    random = [name for name, part in parts if isinstance(part, _DropoutNd) and part.p > 0 and
              (part.training or "lora_dropout" in name)]  # fmt: skip
    training = [name for name, part in parts if isinstance(part, _BatchNorm) and part.training]
    training = [key for key, network in networks.items() if network.training] + training
    figure = f"{len(random)} active dropout layers, {len(training)} networks or norms in train mode"
    advice = ""
    if random:
        advice = f"dropout in {random[0]} makes the ratio of an unchanged policy differ from 1: set its p to 0"
    elif training:
        advice = f"{training[0]} is in train mode: call .eval() on it, the LoRA trains all the same"
    return Finding("modes", not advice, figure, advice)


def check_velocity(task: Task, settings: PolicySettings, prompts: Sequence[PromptRecord]) -> Finding:
    """The update's velocity (with gradients) against the rollout's (without), same rows, and twice: no switch between."""
    policy, guidance = task.policy, task.rollout.guidance_scale
    negative = policy.rows_per_state(guidance) > 1
    conditions, x = policy.encode(prompts[:2], negative=negative, size=task.size), noise(task, 2)
    sigma = middle_sigma(task).expand(2)
    with torch.no_grad():
        first = policy.velocity(x, sigma, conditions, guidance_scale=guidance)
        again = policy.velocity(x, sigma, conditions, guidance_scale=guidance)
    update = policy.velocity(x, sigma, conditions, guidance_scale=guidance).detach()
    twice, switched = relative(again, first), relative(update, first)
    figure = f"{first.dtype}, repeated {twice:.1e}, with gradients {switched:.1e}"
    limit = rounding(settings, 1e-5)
    if first.dtype != torch.float32:
        advice = (
            f"velocities are {first.dtype}: return fp32 from the policy, log-probs are differences of small numbers"
        )
    elif not twice <= limit:
        advice = "two calls on the same rows differ: look for dropout or random layers in the network"
    elif not switched <= limit:
        advice = "the velocity changes when gradients are on: use one guidance_scale and one mode in rollout and update"
    else:
        advice = ""
    return Finding("velocity", not advice, figure, advice)


@torch.no_grad()
def check_parity(task: Task, settings: PolicySettings, prompts: Sequence[PromptRecord]) -> Finding:
    """The deterministic rollout against a pipeline freshly read from the checkpoint, its own scheduler, same latents.

    By the solver, whatever the run's kernel: DPMSolver and a guided kernel differ from the pipeline on purpose.
    Two prompts (of an edit one), encoded in one batch as the pipeline does, without guidance, and if the rollout is guided with it. The
    networks are shared, so no memory is doubled.
    Allowed: 0 for SD3 in fp32 on the CPU, 2e-6 of the largest latent for ε- and v-models and with rollout.fixed_rows, whose calls
    are larger than the pipeline's, else see `rounding`."""
    rollout, worst = task.rollout, 0.0
    records = list(prompts[: 1 if prompts[0].images else 2])
    asked = [
        Sampling(rollout.num_inference_steps, scale, task.size, rollout.schedule)
        for scale in dict.fromkeys((1.0, rollout.guidance_scale))
    ]
    pipeline = _fresh_pipeline(task.policy, settings, pipeline_call(task.policy, asked[0])[0])
    for each in asked:
        start = noise(task, len(records))
        with _casting(start, settings):
            theirs = pipeline_latents(pipeline, task.policy, records, start, each)
        negative = task.policy.rows_per_state(each.guidance_scale) > 1
        conditions = task.policy.encode(records, negative=negative, together=True, size=task.size)
        ours = sample(task.policy, conditions, start, each.num_inference_steps, each.guidance_scale, each.schedule)
        worst = max(worst, relative(ours, theirs))
    exact = task.policy.path.rectified and not task.rollout.fixed_rows
    limit = rounding(settings, 0.0 if exact else 2e-6)
    advice = (
        "the deterministic rollout is not the pipeline's: compare policy.sigmas with the checkpoint's scheduler (class, "
        "shift, spacing), then the order of prompts"
    )
    figure = f"{worst:.1e} from diffusers' own call (allowed {limit:.0e}), {len(asked)} call(s)"
    return Finding("parity", worst <= limit, figure, "" if worst <= limit else advice)


def _casting(x: Tensor, settings: PolicySettings) -> AbstractContextManager[object]:
    """The pipeline's networks are the policy's, which casts inputs and weights in its own calls."""
    return torch.autocast(x.device.type, torch.bfloat16) if settings.master_weights else nullcontext()


def _fresh_pipeline(policy: Policy, settings: PolicySettings, setup: Sequence[str]) -> DiffusionPipeline:
    networks: dict[str, Any] = policy.modules()
    pipeline = read_pipeline(
        settings.path, settings.family, dtype=settings.dtype, vae_dtype=settings.vae_dtype, **networks
    )
    pipeline.to(next(next(iter(networks.values())).parameters()).device)
    exec("\n".join(setup), {"pipe": pipeline})  # as the run's report tells its user
    return pipeline


@torch.no_grad()
def check_conditions(task: Task, settings: PolicySettings, prompts: Sequence[PromptRecord]) -> Finding:
    """Each prompt's rows are its own: [a, b] against [b, a] and against a and b alone, at one state."""
    policy = task.policy
    x, sigma = noise(task, 1).expand(2, *([-1] * (noise(task, 1).ndim - 1))), middle_sigma(task)

    def velocity_of(*records: PromptRecord) -> Tensor:
        return policy.velocity(x[: len(records)], sigma.expand(len(records)), policy.encode(records, size=task.size))

    a, b = prompts[0], prompts[1]
    alone = torch.cat([velocity_of(a), velocity_of(b)])
    together, swapped = velocity_of(a, b), velocity_of(b, a).flip(0)
    apart = relative(alone[:1], alone[1:])
    mixed = max(relative(together, alone), relative(swapped, alone))
    figure = f"own rows {mixed:.1e}, two prompts differ by {apart:.1e}"
    advice = ""
    if apart == 0:
        advice = "two prompts give the same velocity: the prompt does not reach the network, look at Policy.encode"
    elif not mixed <= min(rounding(settings, 1e-5), 0.5 * apart):
        advice = (
            "a prompt's velocity depends on its place in the batch: rows are swapped or mixed, look at encode and rows"
        )
    return Finding("conditions", not advice, figure, advice)


def check_roles(task: Task, settings: PolicySettings, prompts: Sequence[PromptRecord]) -> Finding:
    """A reference pass between forward and backward changes neither requires_grad nor the gradient (I10)."""
    policy, networks = task.policy, task.policy.modules().values()
    if settings.trainable == "full" and not settings.reference_copy:
        return Finding("roles", True, "full weights without policy.reference_copy: there is no reference")
    x, sigma, rows = noise(task, 1), middle_sigma(task), policy.encode(prompts[:1], size=task.size)
    flags: list[list[bool]] = []

    def gradient(between: Callable[[], None]) -> dict[str, Tensor]:
        loss = policy.velocity(x, sigma, rows).square().sum()
        between()
        if not loss.requires_grad:
            return {}
        names, trained = zip(*policy.trainable_parameters(), strict=True)
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}

    def record_flags() -> None:
        flags.append([parameter.requires_grad for network in networks for parameter in network.parameters()])

    def visit() -> None:
        with torch.no_grad(), policy.role("reference"):
            record_flags()
            policy.velocity(x, sigma, rows)
        record_flags()

    record_flags()
    plain = gradient(lambda: None)
    visit()
    if any(flag != flags[0] for flag in flags):
        advice = "a role switches requires_grad and leaves the policy frozen: flip only the layers' disabled flag"
        return Finding("roles", False, "requires_grad changed by a reference pass", advice)
    if not any(bool(grad.any()) for grad in plain.values()):
        advice = "the velocity has no gradient at all: look for no_grad, detach or disabled adapters in the policy"
        return Finding("roles", False, "no gradient", advice)
    returned, moved = distance(gradient(lambda: None), plain), distance(gradient(visit), plain)
    advice = ""
    if not returned <= rounding(settings, 1e-6):
        advice = "after a reference pass the policy's gradient differs: the role must restore what it switched"
    elif not moved <= rounding(settings, 1e-6):
        advice = "a reference pass between forward and backward changes the gradient: the role must touch no parameter"
    return Finding("roles", not advice, f"gradient changed by {moved:.1e}, afterwards {returned:.1e}", advice)


def noise(task: Task, rows: int) -> Tensor:
    """Unit noise [rows, *] on the policy's device."""
    shape = (rows, *task.policy.latent_shape(task.size))
    network: nn.Module = next(iter(task.policy.modules().values()))
    return normal(shape, task.seed, "start", "doctor").to(next(network.parameters()).device)


def middle_sigma(task: Task) -> Tensor:
    """A noise level [1] in the middle of the grid."""
    steps = task.rollout.num_inference_steps
    shape = task.policy.latent_shape(task.size)
    return grid(task.policy, task.rollout.schedule, steps, shape)[steps // 2][None]
