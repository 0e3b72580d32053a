"""The rollouts of all processes as one batch: what every process then computes credit, advantages and selection on."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.distributed.processes import Processes
from rewards import RewardOutput
from samplers import Forest, Tree


def gather_tree(processes: Processes, tree: Tree, mine: Tree) -> Tree:
    """The nodes of `tree`, the plan of all groups, that selection kept on any process; `mine`: those of this one's share."""
    begin = processes.share(tree.num_groups).start
    kept = processes.gather(torch.stack([mine.group + begin, mine.local], 1))
    span = int(tree.local.max()) + 1
    stays = torch.isin(tree.group * span + tree.local, kept[:, 0] * span + kept[:, 1])
    return tree if bool(stays.all()) else tree.keep(stays)


def gather_forest(processes: Processes, tree: Tree, forest: Forest) -> Forest:
    """The forest of `tree`, of which each process rolled out the groups of its share, in the same order of nodes."""
    nodes = _by_process(processes, tree)
    kept = torch.zeros(len(tree), dtype=torch.bool)
    kept[nodes] = processes.gather(forest.row >= 0)
    row = torch.where(kept, kept.cumsum(0) - 1, -1)
    log_prob = forest.log_prob.new_empty(len(tree))
    log_prob[nodes] = processes.gather(forest.log_prob)
    states = forest.states.new_empty((int(kept.sum()), *forest.states.shape[1:]))
    states[row[nodes[kept[nodes]]]] = processes.gather(forest.states)
    evaluations, previews = (round(processes.total(count)) for count in (forest.evaluations, forest.previews))
    gathered = Forest(tree, forest.sigmas, forest.kernel, states, row, log_prob, evaluations, previews)
    for role, velocities in sorted(forest.velocities.items()):
        evaluated = torch.zeros(len(tree), dtype=torch.bool)
        evaluated[nodes] = processes.gather(velocities.row >= 0)
        values = processes.gather(velocities.values)
        order = nodes[evaluated[nodes]].argsort()
        gathered = gathered.with_velocities(role, evaluated.nonzero().flatten(), values[order.to(values.device)])
    for name, scores in sorted(forest.scores.items()):
        by_process = processes.gather(scores)
        gathered = gathered.with_scores(name, torch.empty_like(by_process).index_copy(0, nodes, by_process))
    return gathered


def gather_output(processes: Processes, tree: Tree, output: RewardOutput) -> RewardOutput:
    """The scores of all leaves, in the order of `tree.leaves`; `info` stays with the process that has the images."""
    nodes = _by_process(processes, tree)
    order = torch.searchsorted(tree.leaves, nodes[tree.index[nodes] == tree.num_steps])

    def gathered(values: Tensor) -> Tensor:
        by_process = processes.gather(values)
        return by_process.new_empty(by_process.shape).index_copy(0, order.to(by_process.device), by_process)

    components = {name: gathered(values) for name, values in sorted(output.components.items())}
    uncertain = processes.total(output.uncertainty is not None) > 0  # a share may hold no sample whose part states one
    uncertainty = torch.full_like(output.scores, torch.nan) if output.uncertainty is None else output.uncertainty
    return RewardOutput(
        gathered(output.scores), gathered(output.valid), components, elapsed=output.elapsed,
        uncertainty=gathered(uncertainty) if uncertain else None, channels=output.channels,
    )  # fmt: skip


def _by_process(processes: Processes, tree: Tree) -> Tensor:
    """[N] the nodes of `tree`: those of the first process's groups, then the second's, and so on."""
    shares = processes.shares(tree.num_groups)
    return torch.cat([((tree.group >= s.start) & (tree.group < s.stop)).nonzero().flatten() for s in shares])
