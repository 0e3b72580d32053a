"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from collections.abc import Callable

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
            step=tree.index[tree.parent[children]],
            carry=None if carry is None else carry[tree.parent[children] - nodes[0]],
        )
        spot = position.to(x.device)
        step = kernel(x[spot], v[spot], sigmas[ctx.step], sigmas[tree.index[children]], ctx)
        x = _draw(step, tree, children, noise).to(store_dtype)
        carry = step.carry
        _score(log_prob, step, x, tree, children)
    return Forest(tree, sigmas, kernel, states, row, log_prob, evaluations)
