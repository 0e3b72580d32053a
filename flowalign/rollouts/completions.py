"""What deterministic steps make of the states of a rollout: x0-predictions and ODE completions, for rewards of states."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers import Forest, Tree, Velocity, unroll
from samplers.schedules import subgrid

OLD = "old"  # the role under which a rollout keeps its own velocities


def cost_of_completions(tree: Tree, steps: int | None) -> tuple[int, int]:
    """(states, further network evaluations), at most, to complete both ends of the stochastic steps of `tree`."""
    ends = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    levels = [
        subgrid(i, tree.num_steps, steps or tree.num_steps) for i in tree.index[ends].tolist() if i < tree.num_steps
    ]
    return len(ends), sum(len(each) - 1 for each in levels)


@torch.no_grad()
def completed(
    forest: Forest, nodes: Tensor, steps: int | None, velocity: Velocity, micro_batch: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """[n, *] the states `nodes` [n] after `steps` deterministic steps of the forest's kernel to the end of the grid, on the sub-grid
    of a probe; None: all steps that are left. One step to σ = 0 is the x0-prediction of the path, x − σ·v of a flow.

    The first step takes the velocity that the rollout found there, so S steps cost S − 1 evaluations of each state. A
    state at the end is its own. velocity: of the forest's roots, `micro_batch` rows at a time, on `device`."""
    tree, states = forest.tree, forest.at(nodes)
    for index in tree.index[nodes].unique().tolist():
        if index == tree.num_steps:
            continue
        here = (tree.index[nodes] == index).nonzero().flatten()
        levels = [index, *subgrid(index, tree.num_steps, steps or tree.num_steps)]
        for rows in here.split(micro_batch):
            known = [forest.velocities[OLD].at(nodes[rows], device)]  # that of the first step

            def stepped(
                x: Tensor, sigma: Tensor, row: Tensor, rows: Tensor = rows, known: list[Tensor] = known
            ) -> Tensor:
                return known.pop() if known else velocity(x, sigma, tree.root[nodes[rows]][row])

            states[rows] = unroll(stepped, states[rows].to(device), forest.sigmas[levels], forest.kernel).x.to(states)
    return states
