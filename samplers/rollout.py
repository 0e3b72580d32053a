"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samplers.forest import Forest, compute_dtype
from samplers.kernels.base import Context, Kernel, Step
from samplers.schedules import check_sigmas
from samplers.trees import Tree

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[Tree, Tensor], Tensor]


@torch.no_grad()
def rollout(
    velocity: Velocity,
    x_start: Tensor,
    sigmas: Tensor,
    tree: Tree,
    kernel: Kernel,
    noise: Noise,
    *,
    micro_batch: int | None = None,
    store_dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Forest:
    """Roll `tree` out from `x_start` [R, *] (one row per root) over `sigmas` [T+1], without gradient.

    velocity(x [n, *], sigma [n], root [n]) -> v [n, *] is called on one flat frontier of distinct states, in pieces of
    at most `micro_batch` rows; all children of the frontier are stepped in one kernel call. noise(tree, nodes) ->
    [n, *] gives the draws of the steps arriving at `nodes` (KeyedNoise.step); it is asked for stochastic steps only.
    States are cast to `store_dtype` before log-probs are taken and before the next step, so a replay from what is
    stored sees the same numbers; the network gets them in at least fp32. progress(rows) is called per micro-batch.
    """
    _check(x_start, sigmas, tree, micro_batch)
    row = _kept_rows(tree)
    states = torch.empty((int(row.max()) + 1, *x_start.shape[1:]), dtype=store_dtype, device=x_start.device)
    log_prob = torch.full((len(tree),), torch.nan, dtype=compute_dtype(store_dtype), device=x_start.device)
    x, carry, evaluations = x_start.to(store_dtype), None, 0
    for nodes, children in zip(tree.generations, (*tree.generations[1:], None), strict=True):
        _keep(states, row[nodes], x)
        if children is None:
            break
        parents, position = tree.distinct_parents(children)
        x = x[(parents - nodes[0]).to(x.device)].to(compute_dtype(store_dtype))
        v = _velocities(velocity, x, sigmas[tree.index[parents]], tree.root[parents], micro_batch, progress)
        evaluations += len(parents)
        ctx = Context(
            level=tree.level[children],
            rows=tree.root[children],
            nodes=children,
            parents=tree.parent[children],
            step=tree.index[tree.parent[children]],
            carry=None if carry is None else carry.rows(tree.parent[children] - nodes[0]),
        )
        spot = position.to(x.device)
        step = kernel(x[spot], v[spot], sigmas[ctx.step], sigmas[tree.index[children]], ctx)
        x = _draw(step, tree, children, noise).to(store_dtype)
        carry = step.carry
        _score(log_prob, step, x, tree, children)
    return Forest(tree, sigmas, kernel, states, row, log_prob, evaluations)


def _check(x_start: Tensor, sigmas: Tensor, tree: Tree, micro_batch: int | None) -> None:
    check_sigmas(sigmas)
    if len(sigmas) != tree.num_steps + 1:
        raise ValueError(f"{len(sigmas)} sigmas came for a tree of {tree.num_steps} steps; expected num_steps + 1")
    if x_start.ndim < 2 or len(x_start) != tree.num_roots:
        raise ValueError(
            f"x_start {list(x_start.shape)} came; expected [R, *] with one row per root, R = {tree.num_roots}"
        )
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch={micro_batch} came; expected at least 1, or None for no limit")


def _kept_rows(tree: Tree) -> Tensor:
    """[N] where each node's state is stored, -1 for those nobody asks for again."""
    kept = tree.parent < 0
    kept[tree.edges] = True
    kept[tree.parents_of_edges] = True
    childless = torch.ones(len(tree), dtype=torch.bool)
    childless[tree.evaluated] = False
    kept |= childless
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def _keep(states: Tensor, row: Tensor, x: Tensor) -> None:
    kept = row >= 0
    states[row[kept].to(states.device)] = x[kept.to(x.device)]


def _velocities(
    velocity: Velocity, x: Tensor, sigma: Tensor, root: Tensor, micro_batch: int | None, progress: Callable[[int], None] | None
) -> Tensor:  # fmt: skip
    parts = []
    for rows in torch.arange(len(x)).split(micro_batch or len(x)):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        part = velocity(x[here], sigma[here].to(x.device), root[here])
        if part.shape != x[here].shape:
            raise ValueError(
                f"velocity gave {list(part.shape)} for states {list(x[here].shape)}; expected equal shapes"
            )
        parts.append(part)
        if progress is not None:
            progress(len(rows))
    return torch.cat(parts)


def _draw(step: Step, tree: Tree, children: Tensor, noise: Noise) -> Tensor:
    """The next states; noise is asked for at stochastic steps only."""
    hot = tree.level[children] > 0
    if not bool(hot.any()):
        return step.behaviour.mean
    draws = torch.zeros_like(step.behaviour.mean)
    draws[hot.to(draws.device)] = noise(tree, children[hot]).to(draws)
    return step.sample(draws)


def _score(log_prob: Tensor, step: Step, x: Tensor, tree: Tree, children: Tensor) -> None:
    """Log-probs of the stored states of stochastic steps, under the policy."""
    hot = (tree.level[children] > 0).to(x.device)
    if bool(hot.any()):
        policy = step.policy
        rows = {name: vars(policy)[name][hot] for name in ("mean", "std", "slope", "length")}
        log_prob[children.to(x.device)[hot]] = replace(policy, **rows).log_prob(x[hot]).to(log_prob)
