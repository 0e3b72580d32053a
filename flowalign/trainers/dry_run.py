"""The parts of a policy gradient tried on random scores: what cannot work together shows before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowalign.advantage import Advantages
from flowalign.objectives import LongCat, Moment
from flowalign.trainers.base import Rollout
from flowalign.rollouts.collect import grow
from samplers import Forest, Path, RectifiedFlow, generator

if TYPE_CHECKING:
    from flowalign.trainers.policy_gradient import PolicyGradient

ITERATIONS = 8  # where windows and selections move, one iteration may have nothing to train


def rehearse(trainer: PolicyGradient, rollout: Rollout, reward: str, path: Path) -> None:
    """ValueError if credit, advantage or selection does not fit the plan, or if they would never train a step of it.

    path: the policy's. Two groups at most, no network. Where a plan selects, all its states stand for those that stay."""
    reason = ""
    if not isinstance(path, RectifiedFlow) and trainer.layer_tuning is not None and not trainer.layer_tuning.needs_old:
        raise ValueError(
            f"trainer.layer_tuning.target={trainer.layer_tuning.target} came for a policy on {type(path).__name__}; its "
            "formula is that of a rectified flow: take best_path_velocity"
        )
    if not isinstance(path, RectifiedFlow) and isinstance(trainer.step_weight, LongCat):
        raise ValueError(
            f"trainer.step_weight=LongCat came for a policy on {type(path).__name__}; its formula is that of a rectified "
            "flow: take FlatGradient"
        )
    for iteration in range(ITERATIONS):
        forest = _forest(rollout, iteration)
        if isinstance(path, RectifiedFlow):
            _check_last_step(forest)
        reason = _untrained(trainer, forest, iteration, reward)
        if not reason:
            return
    raise ValueError(f"nothing would be trained: {reason}")


def _forest(rollout: Rollout, iteration: int) -> Forest:
    """The plan's topology without states. ValueError if it asks for what a rollout of this trainer does not give."""
    steps, tree = rollout.num_inference_steps, grow(rollout, 0, iteration, range(min(2, rollout.groups)))
    if bool(tree.source.any()):
        raise ValueError(
            "rollout.plan leaves samples to a hinted student or to a teacher, but this trainer rolls all of them out with "
            "the policy: set hinted=0 and teacher=0, or take the plan inside Sourced"
        )
    level = tree.level[tree.edges].unique()
    half = torch.full_like(level, 0.5)
    rollout.kernel.coefficients(half, half / 2, level)  # some kernels have a highest level
    count = len(tree)
    return Forest(
        tree, torch.linspace(1, 0, steps + 1), rollout.kernel, torch.empty(0, 1), torch.full((count,), -1),
        torch.zeros(count), 0,
    )  # fmt: skip


def _check_last_step(forest: Forest) -> None:
    """ValueError if the step to σ = 0 is to be trained and the kernel draws no noise in it."""
    tree = forest.tree
    level = tree.level[tree.edges[tree.index[tree.edges] == tree.num_steps]].unique()
    std = forest.kernel.coefficients(torch.full_like(level, 0.5), torch.zeros_like(level), level).std
    if bool((std == 0).any()):
        raise ValueError(
            f"rollout.plan trains the last step, in which rollout.kernel={forest.kernel} draws no noise, so that it has no "
            "log-prob: leave it deterministic (train_last=false, high below num_inference_steps), or take FlowSDE"
        )


def _untrained(trainer: PolicyGradient, forest: Forest, iteration: int, reward: str) -> str:
    """Why no step of the forest is trained; "" if one is."""
    rng = generator(0, "data", "rehearsal", iteration)
    scores = torch.from_numpy(rng.random((len(forest.tree.leaves), 1)))
    credit = trainer.credit.assign(forest, scores, torch.ones_like(scores, dtype=torch.bool), (reward,))
    advantages = trainer.advantage.compare(forest, credit)
    drawn = Advantages(torch.from_numpy(rng.normal(size=advantages.valid.shape)).float(), advantages.valid, 0.0)
    chosen = trainer.select.choose(forest, drawn, Moment(0, iteration)) & advantages.valid.any(1)
    if not bool(credit.valid.any()):
        return (
            f"trainer.credit={trainer.credit} finds the scores it needs at no step of rollout.plan; take samplers.Probed "
            "around the plan, or a credit that needs leaves only (Broadcast, SubtreeFusion)"
        )
    if not bool(advantages.valid.any()):
        return (
            f"trainer.advantage={trainer.advantage} compares the steps of one set, and no set of rollout.plan has two; "
            "take a wider set (within=prompt), or a plan whose samples share their start"
        )
    if not bool(chosen.any()):
        return f"trainer.select={trainer.select} leaves out every step of rollout.plan; take AllEdges, or select less"
    return ""
