"""Checks of the update: dtypes, replay, rounding against the clip range, gradients, merged siblings."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from flowalign.config import PolicySettings
from flowalign.diagnostics.doctor.base import Finding
from flowalign.diagnostics.doctor.network import rounding
from flowalign.diagnostics.measure import distance, gradients, nth_siblings, one_pass_per_edge
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.task import Task
from flowalign.trainers import EdgeTrainer, Replayed

NO_REPLAY = "this trainer scores no stochastic step"


def check_dtypes(task: Task, batch: ScoredRollout) -> Finding:
    """States, log-probs and trained parameters are fp32, whatever the frozen network is."""
    found = {
        "states": batch.forest.states.dtype,
        "log-probs": batch.forest.log_prob.dtype,
        "images": task.policy.decode(batch.forest.at(batch.forest.tree.leaves[:1])).dtype,
        **{f"trained {p.dtype}": p.dtype for _, p in task.policy.trainable_parameters()},
    }
    low = [name for name, dtype in found.items() if dtype not in (torch.float32, torch.float64)]
    figure = ", ".join(f"{name.split()[0]} {str(dtype).removeprefix('torch.')}" for name, dtype in found.items())
    advice = f"{', '.join(low)} lost bits that the ratio needs: keep them fp32, only the frozen network may be bf16"
    return Finding("dtypes", not low, figure, advice if low else "")


@torch.no_grad()
def drifts(task: Task, replay: Replayed, batch: ScoredRollout, edges: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """How far the log-probs of an unchanged policy, from network calls of `rows` states, are from the rollout's [E]; how
    far they may be [E]."""
    forest, tree = batch.forest, batch.forest.tree
    parents, position = tree.distinct_parents(edges)

    def replayed(size: int) -> Tensor:
        parts = [
            task.policy.velocity(
                forest.at(nodes), forest.sigma(nodes), batch.conditions.rows(tree.group[nodes]),
                guidance_scale=task.rollout.guidance_scale, detach_uncond=task.rollout.detach_uncond,
            )
            for nodes in parents.split(size)
        ]  # fmt: skip
        return torch.cat(parts)

    step, arrived = forest.edge_steps(edges, replayed(rows), position), forest.at(edges)
    drift = (step.log_prob(arrived) - forest.log_prob[edges]).abs()
    return drift, replay.drift_limit(step, arrived).to(drift)


def check_replay(task: Task, settings: PolicySettings, replay: Replayed | None, batch: ScoredRollout) -> Finding:
    """Invariant I1: the stored steps under unchanged weights, in the update's batch shapes, have ratio 1."""
    if replay is None:
        return Finding("replay", True, NO_REPLAY)
    edges = batch.forest.tree.edges
    drift, limits = drifts(task, replay, batch, edges, replay.micro_batch)
    elements = 1 if task.rollout.kernel.reduce == "mean" else batch.forest.states[0].numel()
    exact = settings.dtype == "fp32" and not torch.cuda.is_available()
    limits = torch.full_like(drift, 1e-6 * elements) if exact else limits / drift_margin(len(edges))
    ok = bool((drift <= limits).all())
    advice = (
        "stored log-probs do not repeat: rollout and update must have the same guidance_scale, mode (eval) and dtypes"
    )
    return Finding(
        "replay", ok, f"{_by_step(batch, edges, drift)} (allowed {float(limits.min()):.0e})", "" if ok else advice
    )


def check_floor(task: Task, replay: Replayed | None, batch: ScoredRollout) -> Finding:
    """Rounding of log-probs between batch shapes (one state per call against the rollout's), with the margin for what a
    run will meet, against what stops a run. Measured at no more than 8 states of each step, at all their edges. Not kept: a
    window that this rollout did not visit may round more than the margin allows for."""
    if replay is None:
        return Finding("floor", True, NO_REPLAY)
    tree = batch.forest.tree
    parent = tree.parent[tree.edges]
    step = tree.index[parent]
    states = torch.cat([parent[step == at].unique()[:8] for at in step.unique()])
    edges = tree.edges[torch.isin(parent, states)]
    drift, limits = drifts(task, replay, batch, edges, 1)
    limit, outside = float(limits.min()), float((drift > limits).double().mean())
    expected = float(drift.max()) * drift_margin(len(edges))
    figure = (
        f"{_by_step(batch, edges, drift)}, in a run up to {expected:.1e}; limit {limit:.1e}, {outside:.0%} of unchanged steps "
        "outside"
    )
    advice = (
        f"rounding of log-probs may reach {expected:.1e} in a run, {replay.allowing(1.05 * expected, limit)}, or take "
        "policy.dtype=fp32"
    )
    ok = expected <= limit
    return Finding("floor", ok, figure, "" if ok else advice)


def drift_margin(count: int) -> float:
    """How many times the largest of `count` measured drifts (abs log ratios of unchanged weights) a run may meet.

    The drift of an edge is ⟨z·δ⟩ of its noise z and the rounding δ of its mean, about normal with mean 0 and deviation s.
    The largest of `count` is below q·s in one case of 20, with (2Φ(q) − 1)^count = 0.05; one of a million edges is above
    5.6 s in one case of 50. Their ratio is 6.6 for 6 edges, 3.6 for 24, 2.1 for 480. Not kept: s differs between steps and
    grows or shrinks as weights move."""
    return 5.6 / NormalDist().inv_cdf((1 + 0.05 ** (1 / count)) / 2)


def _by_step(batch: ScoredRollout, edges: Tensor, values: Tensor) -> str:
    step = batch.forest.tree.index[batch.forest.tree.parent[edges]]
    return ", ".join(f"step {at} {float(values[step == at].max()):.1e}" for at in step.unique().tolist())


def check_gradient(task: Task, found: dict[str, Tensor]) -> Finding:
    """The first gradient is there and finite."""
    norm = sum(float(grad.double().square().sum()) for grad in found.values()) ** 0.5
    figure = f"norm {norm:.2e} in {len(found)} of {len(task.policy.trainable_parameters())} tensors"
    ok = 0 < norm < float("inf")
    advice = "the first gradient is 0 or not finite: the policy is frozen, every advantage is 0, or the loss overflows"
    return Finding("gradient", ok, figure, "" if ok else advice)


def check_reached(task: Task, batch: ScoredRollout, found: dict[str, Tensor]) -> Finding:
    """After one optimizer step every trained tensor gets gradient (LoRA's A gets none while B is 0). Left out: tensors
    from which no path leads to the velocity, such as the last query of SD3's text stream, and networks that work at other
    levels than the trained steps have."""
    tree, named = batch.forest.tree, [name for name, _ in task.policy.trainable_parameters()]
    several = len(task.policy.modules()) > 1  # they share the levels; a single one acts at all alike
    steps = tree.index[tree.parent[tree.edges]].unique().tolist() if several else [0]
    can = set[str]().union(*(_names_that_can_act(task, batch, step) for step in steps or range(tree.num_steps)))
    working = {name.partition(".")[0] for name in can}
    idle = sum(several and name.partition(".")[0] not in working for name in named)
    missed = [name for name in named if name in can and (name not in found or not bool(found[name].any()))]
    dead = len(named) - len(can) - idle
    figure = f"{len(can) - len(missed)} of {len(can)} tensors, {dead} more cannot act on the velocity"
    figure += f", {idle} are of networks that work at other steps" if idle else ""
    advice = ""
    if missed:
        advice = f"the loss does not reach {missed[0]}{f' and {len(missed) - 1} more' if missed[1:] else ''}: look for detach"
    elif dead > 0.1 * (len(can) + dead):
        advice = "many trained tensors cannot change the velocity: take their layers out of policy.lora.targets"
    return Finding("reached", not advice, figure, advice)


def _names_that_can_act(task: Task, batch: ScoredRollout, step: int) -> set[str]:
    """The trained tensors on which the velocity of a start state, at the level of a step, depends."""
    forest = batch.forest
    root = torch.zeros(1, dtype=torch.int64)
    rows = batch.conditions.rows(forest.tree.group[root])
    velocity = task.policy.velocity(forest.at(root), forest.sigmas[step : step + 1], rows)
    names, parameters = zip(*task.policy.trainable_parameters(), strict=True)
    grads = torch.autograd.grad(velocity.square().sum(), parameters, allow_unused=True)
    return {name for name, grad in zip(names, grads, strict=True) if grad is not None and bool(grad.any())}


def check_merged(
    task: Task, settings: PolicySettings, trainer: EdgeTrainer | None, batch: Callable[[], ScoredRollout]
) -> Finding:
    """One forward and backward per distinct state gives the gradient of one per edge: two states, three children each."""
    if trainer is None:
        return Finding("merged", True, "no loss of single steps: nothing is merged")
    rolled = batch()
    parts = one_pass_per_edge(trainer, task, rolled, states=2, children=3)
    if len(parts) < 2:
        return Finding("merged", True, "no state has two trained children: nothing is merged")
    merged = gradients(task.policy, nth_siblings(trainer, task, tuple(range(len(parts))), 2), rolled)
    single: dict[str, Tensor] = {}
    for part, share in parts:
        for name, grad in gradients(task.policy, part, rolled).items():
            single[name] = single.get(name, 0) + share * grad
    error = distance(merged, single)
    ok = error <= rounding(settings, 1e-4)
    advice = "merged siblings give another gradient than one pass per edge: the network depends on its batch mates"
    return Finding("merged", ok, f"{error:.1e} from one pass per edge", "" if ok else advice)
