"""The dry run: credit, advantage and selection on random scores, which refuses what cannot work before a model is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowalign.advantage import SignalContext
from flowalign.credit.base import uncertainty_of
from flowalign.objectives import StepWeight, without_states
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.sources import roles_of
from flowalign.rollouts.task import Rollout
from flowalign.trainers.base import Setup
from flowalign.trainers.signal import Signal
from samplers import Forest, Path, even_sigmas, generator, sampled

ITERATIONS = 8  # where windows and selections move, one iteration may have nothing to train


def dry_run(signal: Signal, step_weight: StepWeight, setup: Setup) -> None:
    """ValueError if credit, advantage or selection does not fit the plan, or if they would never train a step of it.

    At most two groups, no network. Where a plan selects, the dry run takes all its states."""
    reason = ""
    for iteration in range(ITERATIONS):
        forest = _forest(setup.rollout, setup.path, iteration)
        if setup.path.rectified:
            _check_outer_steps(forest)
        for name in setup.state_channels:
            forest = forest.with_scores(name, _random_state_scores(forest, name))
        reason = _untrained(signal, forest, iteration, setup.channels)
        if not reason:
            _check_probes(signal, forest, setup.channels)
            _check_state_channels(signal, step_weight, forest, setup)
            return
    raise ValueError(f"nothing would be trained: {reason}")


def _forest(rollout: Rollout, path: Path, iteration: int) -> Forest:
    """The plan's topology without states. ValueError for samples of a teacher or of a hinted student without a role."""
    steps, tree = rollout.num_inference_steps, grow(rollout, 0, iteration, range(min(2, rollout.groups)))
    roles_of(rollout, tree)
    level = tree.level[tree.edges].unique()
    half = torch.full_like(level, 0.5)
    rollout.kernel.coefficients(half, half / 2, level)  # some kernels have a highest level
    count = len(tree)
    return Forest(
        tree, even_sigmas(steps, path), rollout.kernel, torch.empty(0, 1), torch.full((count,), -1),
        torch.zeros(count), 0,
    )  # fmt: skip


def _check_outer_steps(forest: Forest) -> None:
    """ValueError if the step from σ = 1 or the one to σ = 0 is to be trained and the kernel draws no noise in it."""
    tree = forest.tree
    left, reached = tree.index[tree.parent[tree.edges]], tree.index[tree.edges]
    for name, trained, sigmas, advice in (
        ("first", left == 0, (1.0, 0.5), "a Window with low=1, RandomSteps without candidate 0"),
        ("last", reached == tree.num_steps, (0.5, 0.0), "train_last=false, high below num_inference_steps"),
    ):
        level = tree.level[tree.edges[trained]].unique()
        sigma, sigma_next = (torch.full_like(level, value) for value in sigmas)
        std = forest.kernel.coefficients(sigma, sigma_next, level, 0 if name == "first" else None).std
        if bool((std == 0).any()):
            raise ValueError(
                f"got a rollout.plan that trains the {name} step, in which rollout.kernel={forest.kernel} draws no noise, so that "
                f"it has no log-prob: leave it deterministic ({advice}), or take FlowSDE"
            )


def _check_probes(signal: Signal, forest: Forest, channels: tuple[str, ...]) -> None:
    """ValueError if the plan has probes and the credit is the same whatever they score."""
    tree, sample = forest.tree, sampled(forest.tree)
    if bool(sample.all()):
        return
    scores, others = (_random_scores(forest, len(channels), name) for name in ("samples", "probes"))
    valid = torch.ones_like(scores, dtype=torch.bool)
    plain, changed = (
        signal.credit.assign(forest, given, valid, channels).values
        for given in (scores, torch.where(sample[:, None], scores, others))
    )
    if torch.equal(plain, changed):
        probes = int((~sample).sum()) // tree.num_groups
        raise ValueError(
            f"got a rollout.plan with probes, {probes} of each prompt to decode and score, and trainer.signal.credit={signal.credit}, "
            "which reads none of them: take a credit that does (Gain, TurningPoint), or the plan without samplers.Probed"
        )


def _check_state_channels(signal: Signal, step_weight: StepWeight, forest: Forest, setup: Setup) -> None:
    """ValueError for a process reward that neither the credit nor the step weight reads."""
    scores = _random_scores(forest, len(setup.channels), "states")
    valid, step = torch.ones_like(scores, dtype=torch.bool), without_states(forest)

    def read(forest: Forest) -> Tensor:
        """[E, *] what the update takes from the scores of states."""
        for channel in setup.channels:  # which a reward may state
            forest = forest.with_scores(uncertainty_of(channel), _random_state_scores(forest, "uncertainty", channel))
        credit = signal.credit.assign(forest, scores, valid, setup.channels)
        weight = step_weight.weigh(step, forest, forest.tree.edges)
        return torch.cat([credit.values, weight[:, None].to(credit.values)], 1)

    plain = read(forest)
    for name in setup.state_channels:
        changed = replace(forest, scores={**forest.scores, name: _random_state_scores(forest, name, "again")})
        if torch.equal(plain, read(changed)):
            raise ValueError(
                f"got process_rewards with the channel {name!r}, which neither trainer.signal.credit={signal.credit} nor the step "
                f"weight reads: add flowalign.credit.Process(score={name!r}), beside others in Joined, or "
                f"flowalign.objectives.Agreement(score={name!r}), or leave the reward out"
            )


def _random_scores(forest: Forest, channels: int, *key: str | int) -> Tensor:
    """[L, channels] in [0, 1)."""
    return torch.from_numpy(generator(0, "data", "dry_run", *key).random((len(forest.tree.leaves), channels)))


def _random_state_scores(forest: Forest, *key: str) -> Tensor:
    """[N] in [0, 1)."""
    return torch.from_numpy(generator(0, "data", "dry_run", "states", *key).random(len(forest.tree)))


def _untrained(signal: Signal, forest: Forest, iteration: int, channels: tuple[str, ...]) -> str:
    """Why no step of the forest is trained; "" if one is."""
    scores = _random_scores(forest, len(channels), iteration)
    valid = torch.ones_like(scores, dtype=torch.bool)
    edges = signal.edges(forest, scores, valid, channels, SignalContext(0, iteration))
    if not bool(edges.credit.valid.any()):
        return (
            f"trainer.signal.credit={signal.credit} finds the scores it needs at no step of rollout.plan; take samplers.Probed "
            "around the plan, or a credit that needs leaves only (Broadcast, SubtreeFusion)"
        )
    if not bool(edges.advantages.valid.any()):
        return (
            f"trainer.signal.advantage={signal.advantage} compares the steps of one set, and no set of rollout.plan has two; "
            "take a wider set (within=prompt), or a plan whose samples share their start"
        )
    if not bool(edges.chosen.any()):
        return f"trainer.signal.select={signal.select} leaves out every step of rollout.plan; take AllEdges, or select less"
    return ""
