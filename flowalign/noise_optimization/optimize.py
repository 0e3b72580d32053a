"""The call `optimize_noise` and its one loop: try, remember the best, stop early, until the last iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from flowalign.data import PromptRecord, Sources, as_records
from flowalign.evaluation.evaluate import as_rewards
from flowalign.models import Policy, load_policy
from flowalign.models.base import Sampling, Size
from flowalign.models.checks import check_sources
from flowalign.models.sampling import settle, start_noise
from flowalign.noise_optimization.ascent import SPSA, Gradient
from flowalign.noise_optimization.objective import Method, Objective
from flowalign.noise_optimization.result import Best, NoiseResult, joined
from flowalign.noise_optimization.searches import BestOfN, PathSearch, PreviewSelect, ZeroOrder
from rewards import Reward, RewardError, labels_of
from samplers import Schedule

# names on the command line
METHODS: dict[str, type[Method]] = {
    "gradient": Gradient, "spsa": SPSA, "zero-order": ZeroOrder, "best-of-n": BestOfN, "preview-select": PreviewSelect,
    "path-search": PathSearch,
}  # fmt: skip
Weighted = Mapping[Any, float] | Sequence[Any] | Reward | Callable[..., Any]


def optimize_noise(
    policy: Policy | DiffusionPipeline | str, prompts: str | PromptRecord | Sequence[str | PromptRecord],
    rewards: Weighted, *, steps: int = 50, method: Method | None = None, held_out: Sequence[Reward | Callable[..., Any] | str] = (),
    seed: int = 0, start: Tensor | None = None, num_inference_steps: int | None = None,
    guidance_scale: float | None = None, size: Size | None = None, schedule: Schedule | None = None,
    fps: float | None = None, patience: int | None = None, min_gain: float = 0.0, batch_size: int = 4,
    checkpoint: bool = False, progress: bool = True, image: Sources | None = None,
) -> NoiseResult:  # fmt: skip
    """Finds start noise whose sample the rewards like better; the model's weights stay as they are.

    policy: a policy, a live diffusers pipeline (used as it is, with the LoRA that it has, and left as it was), or a name or
    path for `load_policy`. rewards: {reward: weight}, or one or several of weight 1; functions of (images, prompts) too. What is
    maximized is Σ weight·score, a reward's channels added up; one of weight 0 is only watched, in every iteration. steps: iterations. method: `Gradient()` (ReNO, 2406.04312) by
    default, which needs differentiable rewards; `SPSA`, `ZeroOrder`, `BestOfN`, `PreviewSelect`, `PathSearch` take any.
    held_out: further rewards, which score the first and the best image and decide nothing.

    seed: the first image is that of `policy.generate(prompts, seed=seed)`. start: noise [P, *] in its place, for example of an
    earlier result. num_inference_steps, guidance_scale, size, schedule, fps: of the sampler; None is as `policy.sampling` says.
    patience: a prompt stops once its best total has not risen by more than `min_gain` in so many iterations; None: never.
    batch_size: prompts optimized together, and candidates made together. checkpoint: stores no activations of the blocks of
    network and decoder, and of one sampling step at a time: less memory for one more forward. Prompts are encoded once. A
    prompt's result does not depend on the others, beyond rounding. image: source images of an edit, see `flowalign.data.with_images`.

    ValueError or TypeError for what cannot work, before anything is made. A prompt that never had a valid score keeps its first
    image, and its total is nan; RewardError if that is so for all."""
    if isinstance(method, str) or isinstance(start, str):
        raise TypeError(
            f"got method={method!r}, start={start!r}; expected an object such as method=fa.SPSA(), and noise such as found.noise or "
            "flowalign.noise_optimization.read_noise(folder)"
        )
    records, weighted = as_records(prompts, image), _weighted(rewards)
    others, method = as_rewards(held_out), method or Gradient()
    check(records, weighted, others, method)
    if steps < 1 or batch_size < 1 or (patience is not None and patience < 1):
        raise ValueError(
            f"got steps={steps}, batch_size={batch_size}, patience={patience}; expected at least 1 of each"
        )
    if isinstance(policy, str):
        check_sources(policy, records)
    began, bar = time.monotonic(), tqdm(total=steps * len(records), unit="it", disable=not progress)
    with _as_policy(policy) as live, bar, live.checkpointed() if checkpoint else nullcontext():
        settings = settle(
            live.sampling, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, size=size,
            schedule=schedule, fps=fps,
        )  # fmt: skip
        noise, parts, scores, objectives = _start(live, records, settings, seed, start), [], [], list[Objective]()
        for first in range(0, len(records), batch_size):
            chosen = records[first : first + batch_size]
            conditions = live.encode(
                chosen, negative=live.rows_per_state(settings.guidance_scale) > 1, size=settings.size
            )
            objective = Objective(live, chosen, conditions, settings, weighted, seed, batch_size, checkpoint)
            parts.append(_search(objective, method, noise[first : first + batch_size], steps, patience, min_gain, bar))
            scores.append(_held_out(replace(objective, rewards=[(reward, 0.0) for reward in others]), parts[-1]))
            objectives.append(objective)
    if all(bool(best.total.isnan().all()) for best in parts):
        raise RewardError(
            f"none of {len(records)} prompts got a valid score in {steps} iterations: mend the reward, then try again"
        )
    return joined(
        parts, scores, records, seed, settings, sum(each.evaluations for each in objectives),
        sum(each.images for each in objectives), time.monotonic() - began,
    )  # fmt: skip


def _held_out(objective: Objective, best: Best) -> dict[str, tuple[Tensor, Tensor]]:
    """Scores of the objective's rewards on the first and on the best images."""
    rows = torch.arange(len(best.total))
    with torch.no_grad():
        before = objective.judge_images(best.first.latents, best.first.images, rows)
        after = objective.judge_images(best.latents, best.images, rows)
    return {name: (before.scores[name].cpu(), after.scores[name].cpu()) for name in before.scores}


def _search(
    objective: Objective, method: Method, start: Tensor, steps: int, patience: int | None, min_gain: float, bar: tqdm
) -> Best:
    """The loop, for the prompts of one batch."""
    walk, rows = method.begin(objective, start.to(objective.policy.start(start[:1]).device)), torch.arange(len(start))
    best: Best | None = None
    for iteration in range(steps):
        trial = walk.step(rows)
        best = best or Best.of(trial.first_of_each(len(rows)), steps)
        best.update(iteration, rows, trial.best_of_each(len(rows)), min_gain)
        going = (
            torch.ones(len(rows), dtype=torch.bool) if patience is None else iteration - best.raised[rows] < patience
        )
        bar.update(len(rows) + int((~going).sum()) * (steps - 1 - iteration))  # a prompt that stops is done
        bar.set_postfix(first=f"{best.first.total.nanmean():.4g}", best=f"{best.total.nanmean():.4g}")
        rows = rows[going]
        if not len(rows):
            break
    assert best is not None
    best.finish()
    return best


def _start(
    policy: Policy, records: Sequence[PromptRecord], settings: Sampling, seed: int, start: Tensor | None
) -> Tensor:
    """[P, *]: the given noise, or that of the first sample of each prompt."""
    shape = policy.latent_shape(settings.size)
    if start is None:
        return torch.stack([start_noise(shape, seed, record, 0) for record in records])
    if start.shape != (len(records), *shape) or not bool(start.isfinite().all() and start.flatten(1).any(1).all()):
        raise ValueError(
            f"got start noise {list(start.shape)}; expected finite numbers, no latent all zeros, [{len(records)}, {', '.join(map(str, shape))}]: one "
            "latent per prompt"
        )
    return start.detach().to("cpu", torch.float32)


def _weighted(rewards: Weighted) -> list[tuple[Reward, float]]:
    """Rewards with their weights. ValueError for none, for a weight that is not a number, and for equal names."""
    if isinstance(rewards, Mapping):
        listed, weights = as_rewards(list(rewards)), [float(weight) for weight in rewards.values()]
    else:
        listed = as_rewards(
            list(rewards) if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
        )
        weights = [1.0] * len(listed)
    if not any(weights) or not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(
            f"got rewards with the weights {weights}; expected finite ones, of which one at least is not 0"
        )
    return list(zip(listed, weights, strict=True))


def check(
    records: Sequence[PromptRecord], rewards: Sequence[tuple[Reward, float]], held_out: Sequence[Reward], method: Method
) -> None:  # fmt: skip
    """ValueError for what cannot work, before a model is loaded."""
    if not records or len({record.uid for record in records}) < len(records):
        raise ValueError(f"got {len(records)} prompts; expected at least one, and none with the uid of another")
    everything = [*(reward for reward, _ in rewards), *held_out]
    labels = [label for reward in everything for label in labels_of(reward)]
    if len(set(labels)) < len(labels) or "total" in labels or "norm" in labels:
        raise ValueError(
            f"got rewards {labels}; expected different names, none of them 'total' or 'norm': give each a `name`"
        )
    for reward in everything:
        if reward.spec.groupwise or reward.spec.scope != "terminal":
            raise ValueError(
                f"got the reward {reward.name!r}, which scores {'groups' if reward.spec.groupwise else 'states on the way'}; "
                "expected one that scores each finished image by itself"
            )
    blind = [reward.name for reward, weight in rewards if weight and not reward.spec.differentiable]
    if method.needs_gradient and blind:
        raise ValueError(
            f"got {', '.join(blind)}, which {'has' if len(blind) == 1 else 'have'} no gradient, with {type(method).__name__}; "
            "expected differentiable rewards, or a method that needs scores only: method=fa.SPSA(), fa.ZeroOrder(), fa.BestOfN(), "
            "fa.PreviewSelect() or fa.PathSearch() (--method on the command line); a function that keeps the graph is "
            "rewards.FunctionReward(function, differentiable=True)"
        )


@contextmanager
def _as_policy(given: Policy | DiffusionPipeline | str) -> Iterator[Policy]:
    """A policy; of a live pipeline the modes and flags of its networks are put back afterwards."""
    if not isinstance(given, str | DiffusionPipeline):
        yield given
        return
    parts = (
        [] if isinstance(given, str) else [each for each in given.components.values() if isinstance(each, nn.Module)]
    )
    modes = [(module, module.training) for part in parts for module in part.modules()]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        yield load_policy(given, trainable="none")
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in flags:
            parameter.requires_grad_(needed)
