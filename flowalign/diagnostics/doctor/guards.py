"""Warnings for what a class of models does not take: many or coarse steps, guidance, noise that stays, a clip range of other latents.

A warning is a finding that is ok and has advice: it may be meant so. Figures come from configurations and grids, in closed form."""

from __future__ import annotations

from pathlib import Path

import torch

from flowalign.config import TrainConfig
from flowalign.diagnostics.doctor.base import Finding
from flowalign.models.checks import distilled_of, guidance_of
from flowalign.models.grid import grid
from flowalign.objectives import ClipRange
from flowalign.objectives.transitions import scale_of_clip_range
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Task
from samplers import TransitionContext, Tree, plain_sigmas

MORE_STEPS = 2.0  # times as many as a checkpoint was distilled for
LARGEST_STEP = 0.5  # of all levels. SD3's own grid: 0.42 of 6 steps, 0.49 of 5, 0.59 of 4
LEAST_COVER = 0.02  # of all levels, by a sample's stochastic steps together. The first two of SD3's ten: 0.05
MOST_NOISE = 0.3  # in deviations of the data, left by the last stochastic step. Flow-GRPO's ten steps of SD3.5: 0.23
OTHER_CLIP = 3.0  # factor of a clip range for latents of PAPER_ELEMENTS
PAPER_ELEMENTS = 65536  # 16·64·64
NAMES = ("turbo", "lightning", "schnell", "hyper", "lcm", "distill")  # only ever a hint


def check_distilled(config: TrainConfig) -> Finding:
    """Steps of rollout and evaluation against those that the checkpoint was distilled for."""
    most = distilled_of(config.policy.path, config.policy.family).steps
    steps = {"rollout": config.rollout.num_inference_steps, "evaluation": config.evaluation.num_inference_steps}
    figure = ", ".join(f"{name} {count} steps" for name, count in steps.items())
    if most is None:
        hint = next((name for name in NAMES if name in Path(config.policy.path).name.lower()), None)
        figure += ", no few-step model by its configuration"
        return Finding(
            "distilled", True, figure + (f", whose name says {hint}: if it is one, take its steps" if hint else "")
        )
    far = [f"{name}.num_inference_steps={most}" for name, count in steps.items() if count > MORE_STEPS * most]
    advice = f"more steps make the samples of a distilled model worse: set {' and '.join(far)}" if far else ""
    return Finding("distilled", True, f"{figure}; distilled for at most {most} (bound {MORE_STEPS * most:g})", advice)


def check_guidance(config: TrainConfig, task: Task) -> Finding:
    """The scales against what the model was trained with."""
    path, family = config.policy.path, config.policy.family
    kind, few = guidance_of(path, family), distilled_of(path, family).steps is not None
    scales = {"rollout": config.rollout.guidance_scale, "evaluation": config.evaluation.guidance_scale}
    figure = f"{kind.replace('_', '-')}, " + ", ".join(f"{name} {scale:g}" for name, scale in scales.items())
    advice = ""
    if kind == "embedded" and (ones := [f"{name}.guidance_scale" for name, scale in scales.items() if scale == 1]):
        usual = task.policy.sampling
        example = (
            ""
            if usual is None or usual.guidance_scale == 1
            else f", such as the pipeline's own {usual.guidance_scale:g}"
        )
        advice = (
            f"the scale is an input of the network, for which 1 is not 'none' but a scale it was hardly trained with: set {' and '.join(ones)} "
            f"to a usual one{example}"
        )
    elif kind == "classifier_free" and few and (high := [name for name, scale in scales.items() if scale > 1]):
        advice = (
            "a model of few steps has the guidance in its weights, and more of it doubles the cost and overshoots: set "
            + " and ".join(f"{name}.guidance_scale=1" for name in high)
        )
    return Finding("guidance", True, figure, advice)


def check_grid(config: TrainConfig, task: Task) -> Finding:
    """The largest step of the rollout's grid, unless the model was distilled for as few, and what a multistep solver needs."""
    settings, policy = task.rollout, task.policy
    count, sigmas = settings.num_inference_steps, _sigmas(task)
    few = distilled_of(config.policy.path, config.policy.family).steps
    figure = f"the largest of {count} steps covers {_largest(sigmas):.0%} of the levels (bound {LARGEST_STEP:.0%})"
    advice = ""
    if few is not None and count <= MORE_STEPS * few:
        figure += f", of a model distilled for {few}"
    elif _largest(sigmas) > LARGEST_STEP:
        shape = policy.latent_shape(task.size)
        enough = (more for more in range(count + 1, 61) if _largest(policy.sigmas(more, shape)) <= LARGEST_STEP)
        cures = [f"rollout.num_inference_steps={more} of the model's own grid" for more in enough][:1]
        if policy.path.rectified and _largest(plain_sigmas(count)) <= LARGEST_STEP:
            cures.append("rollout.schedule=samplers.PlainShift")
        advice = f"the grid is one jump with little beside it: take {' or '.join(cures) or 'more steps'}"
    elif count < 3 and _multistep(task, sigmas):
        advice = f"{settings.kernel} has no history before its third step: take at least 3, or samplers.ODE"
    return Finding("grid", True, figure, advice)


def check_noise(task: Task) -> Finding:
    """Of the stochastic steps: the share of the levels that they cover, and the noise that the last one leaves beyond what its level
    says. With a network that is exact, x' = α·x + b·v + s·z has the noise √((α·b_σ + b·d_σ)² + s²), where the level has b_σ'. Kernels
    that keep the marginals leave none (DDIM, CPS); later deterministic steps take such noise for data."""
    trees = [tree for number in range(8) if len((tree := grow(task.rollout, task.seed, number, [0])).edges)]
    if not trees:
        return Finding("noise", True, "no stochastic step")
    sigmas = _sigmas(task)
    cover, left = min(_covered(tree, sigmas) for tree in trees), max(_left(task, tree, sigmas) for tree in trees)
    figure = f"stochastic steps cover {cover:.1%} of the levels (bound {LEAST_COVER:.0%}), the last leaves noise of {left:.2f} (bound {MOST_NOISE})"
    advice = ""
    if left > MOST_NOISE:
        advice = (
            "what is decoded shows the noise of a step that is long for its noise level: lower rollout.kernel.noise_level, take "
            "samplers.CPS, which leaves none, more steps, or a plan whose last stochastic step is earlier"
        )
    elif cover < LEAST_COVER:
        advice = "members of a group hardly differ: let rollout.plan choose more steps, or longer ones"
    return Finding("noise", True, figure, advice)


def check_clip(task: Task, clip: ClipRange | None) -> Finding:
    """A clip range that is not said to be for other latents, against one for latents of PAPER_ELEMENTS (see `scale_of_clip_range`)."""
    if clip is None:
        return Finding("clip range", True, "no ratio of log-probs is clipped")
    like = torch.empty(1, *task.policy.latent_shape(task.size), device="meta")
    reduce, elements = task.rollout.kernel.reduce, like.numel()
    if clip.elements is not None:
        scaled = clip.low * scale_of_clip_range(clip.elements, like, reduce)
        return Finding(
            "clip range", True, f"{clip.low:.1e} of {clip.elements:,} elements, {scaled:.1e} for {elements:,} here"
        )
    factor = scale_of_clip_range(PAPER_ELEMENTS, like, reduce)
    figure = f"{clip.low:.1e} as it stands for {elements:,} elements, where papers' are {factor:.2g} times theirs (bound {OTHER_CLIP:g})"
    advice = (
        f"if it was found for latents of {PAPER_ELEMENTS:,} elements, it means {factor * clip.low:.1e} here: set elements={PAPER_ELEMENTS} beside "
        f"it, or elements={elements} if it was found for these"
    )
    return Finding("clip range", True, figure, "" if 1 / OTHER_CLIP <= factor <= OTHER_CLIP else advice)


def _sigmas(task: Task) -> torch.Tensor:
    settings = task.rollout
    return grid(
        task.policy, settings.schedule, settings.num_inference_steps, task.policy.latent_shape(task.size)
    ).double()


def _largest(sigmas: torch.Tensor) -> float:
    return round(float((sigmas[:-1] - sigmas[1:]).max() / (sigmas[0] - sigmas[-1])), 6)


def _multistep(task: Task, sigmas: torch.Tensor) -> bool:
    x = torch.zeros(1, 1)
    context = TransitionContext(level=0.0, step=torch.tensor([0]))
    return task.rollout.kernel(x, x, float(sigmas[0]), float(sigmas[1]), context).carry is not None


def _covered(tree: Tree, sigmas: torch.Tensor) -> float:
    steps = tree.index[tree.parents_of_edges].unique()
    return float((sigmas[steps] - sigmas[steps + 1]).sum() / (sigmas[0] - sigmas[-1]))


def _left(task: Task, tree: Tree, sigmas: torch.Tensor) -> float:
    """The noise that the last stochastic step leaves, at its highest level."""
    steps = tree.index[tree.parent[tree.edges]]
    last = int(steps.max())
    level, (sigma, after) = (
        tree.level[tree.edges][steps == last].max().double()[None],
        (sigmas[[last]], sigmas[[last + 1]]),
    )
    made, (_, b, _, d) = task.rollout.kernel.coefficients(sigma, after, level, last), task.policy.path.mix(sigma)
    noise = ((made.alpha * b + made.velocity_coef * d).square() + made.std.square()).sqrt()
    return float(noise - task.policy.path.mix(after)[1])
