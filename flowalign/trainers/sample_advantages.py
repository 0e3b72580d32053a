"""Advantages of whole samples, for trainers that roll out without noise on the way: a sample counts as one step."""

from __future__ import annotations

import torch

from flowalign.advantage import Advantage, Advantages, SignalContext
from flowalign.credit import Broadcast
from flowalign.rollouts.collect import ScoredRollout
from flowalign.rollouts.rolling import leaves_per_group
from flowalign.trainers.base import Setup
from samplers import ODE, Chain, Forest, Tree, generator


def sample_advantages(advantage: Advantage, batch: ScoredRollout, context: SignalContext) -> Advantages:
    """Those of the leaves [L, C], in their order; the batch has no probes and groups of one size."""
    tree = batch.forest.tree
    forest = _one_step(tree.num_groups, len(tree.leaves) // tree.num_groups)
    credit = Broadcast().assign(forest, batch.scores, batch.valid, batch.channels)
    return advantage.compare(forest, credit, context)


def check_samples(advantage: Advantage, setup: Setup) -> None:
    """ValueError for groups in which nothing can be compared, or an advantage that does not fit samples or channels."""
    samples, _ = leaves_per_group(setup.rollout)
    if samples < 2:
        raise ValueError(
            f"got {samples} samples of each prompt (rollout.group_size={setup.rollout.group_size}); expected at least 2, which the "
            "advantage compares"
        )
    forest = _one_step(2, samples)
    scores = torch.from_numpy(generator(0, "data", "dry_run").random((2 * samples, len(setup.channels))))
    credit = Broadcast().assign(forest, scores, torch.ones_like(scores, dtype=torch.bool), setup.channels)
    advantage.compare(forest, credit, SignalContext())


def _one_step(groups: int, samples: int) -> Forest:
    """Each sample a stochastic step from a root of its own: edges in the order of the samples, without states."""
    chains = Chain(train_last=True)
    tree = Tree.cat([chains.tree(1, samples, 0, generator(0)) for _ in range(groups)])
    count = len(tree)
    return Forest(
        tree, torch.tensor([1.0, 0.0]), ODE(), torch.empty(0, 1), torch.full((count,), -1), torch.zeros(count), 0
    )
