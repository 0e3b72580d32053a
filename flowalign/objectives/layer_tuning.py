"""Layer tuning: the states of a tree are pulled towards its best path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.objectives.supervision import Targets, check_fade, faded
from samplers import Forest, Held, Path, sampled
from samplers.kernels.base import spread


@dataclass(frozen=True)
class LayerTuning:
    """Pulls each state towards its tree's best path (Dynamic-TreeRPO 2509.23352, whose formula is not public: our reading).

    ℓ* is the tree's best leaf; a trained state n with fused reward R̄(n) gets weight clip((R* − R̄)/(R* − R_min + 1e-6),
    0, 1); states on the best path get no target.
    target: "best_path_velocity", the paper's: the rollout's velocity at the best path's state of the same grid step, read
    from forest.velocities["old"] (sensible only where a tree's states are close); "best_leaf_fm": (n − x*)/σ, straight to
    the best clean latent (rectified flows only).
    scale: λ, which multiplies the term; it falls linearly to 0 over `fade` iterations (None: stays)."""

    target: Literal["best_path_velocity", "best_leaf_fm"] = "best_path_velocity"
    scale: float = 0.01
    fade: int | None = None
    needs_guidance = False
    role = None

    def __post_init__(self) -> None:
        if self.target not in ("best_path_velocity", "best_leaf_fm"):
            raise ValueError(f"got target={self.target!r}; expected 'best_path_velocity' or 'best_leaf_fm'")
        check_fade(self.scale, self.fade)

    def check(self, path: Path, channels: tuple[str, ...]) -> None:
        """ValueError for several channels, since leaves are ranked by one, and unless the target's formula holds on `path`."""
        if len(channels) > 1:
            raise ValueError(f"got LayerTuning with the rewards {list(channels)}; expected one, to rank leaves by")
        if self.target == "best_leaf_fm" and not path.rectified:
            raise ValueError(
                f"got LayerTuning with target={self.target} for a policy on {type(path).__name__}; its formula is that of a "
                "rectified flow: take best_path_velocity"
            )

    @property
    def needs_old(self) -> bool:
        """Whether forest.velocities["old"] must hold every trained state."""
        return self.target == "best_path_velocity"

    def scale_at(self, iteration: int) -> float:
        """λ in this iteration."""
        return faded(self.scale, self.fade, iteration)

    def targets(self, forest: Forest, scores: Tensor, valid: Tensor) -> Targets:
        """The targets of the trained states.

        States below which a sample is invalid have none, nor have trees without a valid one. Probes are no samples."""
        scores, valid = scores[:, 0], valid[:, 0]
        tree, sample = forest.tree, sampled(forest.tree)
        nodes, best_leaf, best_state = [], [], []
        for root in tree.root[tree.edges].unique().tolist():
            own = ((tree.root[tree.leaves] == root) & valid & sample).nonzero().flatten()
            if not len(own):
                continue
            leaf = int(tree.leaves[own[scores[own].argmax()]])
            path = _path(forest, leaf)
            for node in tree.parents_of_edges[tree.root[tree.parents_of_edges] == root].tolist():
                other = path.get(int(tree.index[node]))
                if other is not None and other != node:
                    nodes.append(node)
                    best_leaf.append(leaf)
                    best_state.append(other)
        states, ends, beside = (torch.tensor(column, dtype=torch.int64) for column in (nodes, best_leaf, best_state))
        if self.target == "best_leaf_fm":
            here = (forest.row[states] >= 0) & (forest.row[ends] >= 0)
            x = forest.at(states[here])
            velocity = Held.of((x - forest.at(ends[here])) / spread(forest.sigma(states[here]).to(x), x), here)
        elif "old" in forest.velocities:
            velocity = forest.velocities["old"].pick(beside)
        else:
            raise ValueError(
                "got a forest without velocities['old'] for LayerTuning(target='best_path_velocity'); expected those of the "
                "rollout: collect with keep_velocities=True"
            )
        return Targets(states, velocity, self._weights(forest, states, scores, valid, sample))

    def _weights(self, forest: Forest, states: Tensor, scores: Tensor, valid: Tensor, sample: Tensor) -> Tensor:
        """ω [S]; R̄ of a state is the mean of the samples below the stochastic steps that leave it."""
        tree = forest.tree
        rewards = torch.where(valid, scores.double(), 0.0)
        edge, leaf = tree.leaf_of_edge
        edge, leaf = edge[sample[leaf]], leaf[sample[leaf]]
        valid = valid & sample
        total, count, bad = (torch.zeros(len(tree), dtype=torch.float64) for _ in range(3))
        for column, values in ((total, rewards[leaf]), (count, torch.ones_like(rewards[leaf])), (bad, ~valid[leaf])):
            column.index_add_(0, tree.parent[tree.edges[edge]], values.double())
        root = tree.root[tree.leaves[valid]]
        best = torch.full((tree.num_roots,), -torch.inf, dtype=torch.float64)
        worst = -best
        best.scatter_reduce_(0, root, rewards[valid], "amax")
        worst.scatter_reduce_(0, root, rewards[valid], "amin")
        own = tree.root[states]
        gap = (best[own] - total[states] / count[states].clamp(min=1)) / (best[own] - worst[own] + 1e-6)
        return torch.where(bad[states] > 0, 0.0, gap.clamp(0, 1))


def _path(forest: Forest, leaf: int) -> dict[int, int]:
    """{grid index: node} of the trained states on the way from the root to `leaf`."""
    tree, node, path = forest.tree, leaf, {}
    while node >= 0:
        above = int(tree.parent[node])
        if above >= 0 and float(tree.level[node]) > 0:
            path[int(tree.index[above])] = above
        node = above
    return path
