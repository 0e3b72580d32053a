"""Combinations of a distillation that cannot work, named before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowalign.objectives import Match, Steps
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout
from flowalign.trainers.base import Setup
from flowalign.trainers.visits import check_arrivals
from samplers import Tree, unscored

if TYPE_CHECKING:
    from flowalign.trainers.distillation import Distillation


def check_combinations(trainer: Distillation, setup: Setup) -> None:
    """ValueError for what does not fit together."""
    rollout = setup.rollout
    tree = grow(rollout, 0, 0, [0])
    _check_on_policy(rollout, tree)
    anchor = None if trainer.anchor is None else trainer.anchor.match
    _check_match(trainer.match, anchor, tree, setup)
    if trainer.query is not None:
        _check_query(trainer, tree)
    if trainer.horizon == "full":
        _check_full(trainer, tree)
    if trainer.gate is not None:
        if not trainer.score_images:
            raise ValueError(
                "got trainer.gate with trainer.score_images=false; expected true: the gate reads the scores"
            )
        trainer.gate.column(setup.channels)
    if trainer.split == "teacher" and (trainer.updates_per_rollout > 1 or len(trainer.teachers) < 2):
        raise ValueError(
            f"got trainer.split=teacher with updates_per_rollout={trainer.updates_per_rollout} and {len(trainer.teachers)} teacher(s); "
            "expected 1 and at least two: an update takes the groups of one teacher"
        )
    setup.check_equal_parts(trainer.updates_per_rollout)


def _check_on_policy(rollout: Rollout, tree: Tree) -> None:
    """All states must be the student's own, each of a sample, and drawn by the kernel itself."""
    if rollout.plan.select(unscored) is not None or bool(tree.probe.any()):
        raise ValueError(
            f"got rollout.plan={rollout.plan} with a selection or with probes; expected neither: states that are dropped or "
            "belong to no sample are not where the student goes"
        )
    if bool(tree.source.any()) or rollout.reward_guidance is not None:
        raise ValueError(
            "got a rollout with samples of others (samplers.Sourced) or with rollout.reward_guidance; expected the student's "
            "own states: leave it out"
        )


def _check_match(match: Match, anchor: Match | None, tree: Tree, setup: Setup) -> None:
    """A KL needs stochastic steps, and noise in each of them."""
    if anchor is not None and anchor.stochastic_only and not match.stochastic_only:
        raise ValueError(
            f"got trainer.anchor.match.form=kl with trainer.match.form={match.form}, which has deterministic steps too; expected "
            "another form for the anchor, such as velocity"
        )
    if not match.stochastic_only:
        return
    edges = tree.edges
    if not len(edges):
        raise ValueError(
            "got trainer.match.form=kl with a rollout.plan without a stochastic step, where a KL is infinite; expected a plan "
            "such as samplers.Chain, or form=ode, its limit for deterministic steps"
        )
    if setup.path.rectified:
        sigmas, left = torch.linspace(1, 0, tree.num_steps + 1).double(), tree.parent[edges]
        index = tree.index[left]
        steps = Steps(left, sigmas[index], sigmas[tree.index[edges]], tree.level[edges], index)
        try:
            match.weight(setup.rollout.kernel, setup.path, steps)
        except ValueError as error:
            raise ValueError(f"trainer.match: {error}") from error


def _check_query(trainer: Distillation, tree: Tree) -> None:
    """Rollouts that stop have no image, and no step whose noise could matter."""
    if trainer.match.reads_level or (trainer.anchor is not None and trainer.anchor.match.reads_level):
        raise ValueError(
            f"got trainer.query with form={trainer.match.form}; expected velocity, x0 or ode: the rollout stops at the state, so no "
            "noisy step leaves it"
        )
    if trainer.score_images or trainer.horizon == "full":
        raise ValueError(
            f"got trainer.query with score_images={str(trainer.score_images).lower()} and horizon={trainer.horizon}; expected false and "
            "myopic: the rollout stops on the way, and nothing is decoded"
        )
    if len(tree.leaves) != tree.num_roots:
        raise ValueError(
            "got trainer.query with a rollout.plan whose samples share states; expected a start of its own for each: take "
            "samplers.Deterministic, or shared_start=false"
        )


def _check_full(trainer: Distillation, tree: Tree) -> None:
    """The score-function term is exact for the policy that rolled out, and only if every step before a state has a density."""
    if trainer.updates_per_rollout > 1 or trainer.split == "teacher" or trainer.gate is not None:
        raise ValueError(
            f"got trainer.horizon=full with updates_per_rollout={trainer.updates_per_rollout}, split={trainer.split}, "
            f"gate={trainer.gate}; expected 1, groups and no gate: its second term is that of the policy that rolled out"
        )
    if trainer.match.normalized or (trainer.anchor is not None and trainer.anchor.match.normalized):
        raise ValueError(
            "got trainer.horizon=full with match.normalized=true; expected false: then there is no expected sum"
        )
    check_arrivals(tree, tree.parents_of_edges if trainer.match.stochastic_only else tree.evaluated)
