"""Small trees and forests on them, for tests of credit, advantages, selectors and plots."""

import torch

from samplers import FlowSDE, Forest, KeyedNoise, Tree, diffusers_sigmas, rollout


def grown(tree: Tree, kernel=None, width: int = 3) -> Forest:
    """`tree` rolled out with velocity −0.3 x."""
    noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (width,))
    sigmas = diffusers_sigmas(tree.num_steps)
    return rollout(lambda x, s, r: -0.3 * x, noise.start(tree), sigmas, tree, kernel or FlowSDE(), noise.step)


def probed(steps: int, samples: int) -> Tree:
    """`samples` chains of `steps` steps, all stochastic but the last; every state but the last two has an ODE probe.

    Node by node: the chain first, then the probe of its state 0, of its state 1, and so on."""
    parent, index, level, probe = [], [], [], []
    for _ in range(samples):
        start = len(parent)
        for step in range(steps + 1):
            parent.append(-1 if step == 0 else start + step - 1)
            index.append(step)
            level.append(float(0 < step < steps))
            probe.append(False)
        for step in range(steps - 1):
            for grid_index in range(step + 1, steps + 1):
                parent.append(start + step if grid_index == step + 1 else len(parent) - 1)
                index.append(grid_index)
                level.append(0.0)
                probe.append(True)
    return Tree.from_parents(parent, index, level, steps, probe)


def split_tree(steps: int, splits: tuple[int, ...], width: int = 2) -> Tree:
    """One root; every step stochastic; each state has `width` children at the steps of `splits` (BranchGRPO)."""
    parent, index, level, states = [-1], [0], [0.0], [0]
    for step in range(steps):
        parents = [state for state in states for _ in range(width if step in splits else 1)]
        states = list(range(len(parent), len(parent) + len(parents)))
        parent, index, level = parent + parents, index + [step + 1] * len(parents), level + [1.0] * len(parents)
    return Tree.from_parents(parent, index, level, steps)


def trunk(steps: int, seeds: int, width: int) -> Tree:
    """TempFlow-GRPO: ODE trunks; at each step but the last `width` one-step branches, completed by ODE."""
    parent, index, level = [], [], []
    for _ in range(seeds):
        start = len(parent)
        parent += [-1, *range(start, start + steps)]
        index += range(steps + 1)
        level += [0.0] * (steps + 1)
        for step in range(steps - 1):
            for _ in range(width):
                for grid_index in range(step + 1, steps + 1):
                    parent.append(start + step if grid_index == step + 1 else len(parent) - 1)
                    index.append(grid_index)
                    level.append(float(grid_index == step + 1))
    return Tree.from_parents(parent, index, level, steps)


def leaves_under(tree: Tree, node: int) -> torch.Tensor:
    """The leaves (node numbers) that descend from `node`; a leaf is under itself."""
    under = torch.arange(len(tree)) == node
    for nodes in tree.generations[1:]:
        under[nodes] |= under[tree.parent[nodes]]
    return tree.leaves[under[tree.leaves]]


def everywhere(scores: torch.Tensor) -> torch.Tensor:
    """All valid."""
    return torch.ones_like(scores, dtype=torch.bool)
