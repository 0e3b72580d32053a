"""What a rollout returns: the kept states, the behaviour log-probs, and the replay of any stored step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import Context, Kernel, Step
from samplers.trees import Tree


@dataclass(frozen=True, eq=False)
class Forest:
    """A rolled-out tree.

    states [K, *] in the storage dtype: roots, edges' parents and arrivals, and nodes without children; row [N] says
    where a node's state lies (-1: not kept). log_prob [N]: under the policy that rolled out, taken after the storage
    cast; nan where the step is deterministic. evaluations: velocities computed, in rows. `sigmas` and `kernel` are
    those of the rollout: a replay cannot use others.
    """

    tree: Tree
    sigmas: Tensor
    kernel: Kernel
    states: Tensor
    row: Tensor
    log_prob: Tensor
    evaluations: int

    def at(self, nodes: Tensor) -> Tensor:
        """States of `nodes` [n, *], exactly what the rollout gave the network, in at least fp32.

        ValueError for a node that was not kept.
        """
        rows = self.row[nodes]
        if bool((rows < 0).any()):
            missing = nodes[rows < 0][:8].tolist()
            raise ValueError(
                f"the states of nodes {missing} were not kept; a forest keeps roots, leaves and both ends of every "
                "stochastic step: give the step a level, or score the state during the rollout"
            )
        return self.states[rows.to(self.states.device)].to(compute_dtype(self.states.dtype))

    def sigma(self, nodes: Tensor) -> Tensor:
        """Noise levels at which `nodes` sit [n]: what the network is evaluated at."""
        return self.sigmas[self.tree.index[nodes]]

    def step_sigmas(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """σ left and σ' reached by the steps arriving at `edges`, each [E]."""
        return self.sigma(self.tree.parent[edges]), self.sigma(edges)

    def path_sum(self, values: Tensor) -> Tensor:
        """Sum of `values` [N] over the stochastic steps from root to leaf, [L] in the order of tree.leaves."""
        return self.tree.path_sum(values)

    def edge_steps(self, edges: Tensor, velocity_of_parents: Tensor, parent_pos: Tensor) -> Step:
        """Replay: the transitions that arrived at `edges` [E], under new velocities.

        velocity_of_parents [P, *]: one row per distinct state. parent_pos [E]: which row each edge leaves, as
        tree.distinct_parents(edges) gives it, so that siblings share one forward and backward. Same kernel, σ, σ',
        level and arithmetic as the rollout: with unchanged velocities log_prob(self.at(edges)) repeats self.log_prob.
        """
        parents = self.tree.parent[edges]
        _check_positions(edges, parents, len(velocity_of_parents), parent_pos)
        sigma, sigma_next = self.step_sigmas(edges)
        ctx = Context(
            level=self.tree.level[edges], rows=self.tree.root[edges], nodes=edges, step=self.tree.index[parents]
        )
        velocity = velocity_of_parents[parent_pos.to(velocity_of_parents.device)]
        return self.kernel(self.at(parents), velocity, sigma, sigma_next, ctx)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sampler arithmetic uses for states stored as `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _check_positions(edges: Tensor, parents: Tensor, rows: int, parent_pos: Tensor) -> None:
    if bool((parents < 0).any()):
        raise ValueError(f"roots {edges[parents < 0][:8].tolist()} came; expected nodes that a step arrives at")
    if parent_pos.shape != edges.shape or bool(((parent_pos < 0) | (parent_pos >= rows)).any()):
        raise ValueError(
            f"parent_pos {list(parent_pos.shape)} came for edges {list(edges.shape)} and {rows} velocity rows; expected "
            "one row number per edge: use tree.distinct_parents(edges)"
        )
    owner = torch.full((rows,), -1, dtype=parents.dtype)
    owner[parent_pos.cpu()] = parents
    if bool((owner[parent_pos.cpu()] != parents).any()):
        raise ValueError("one velocity row was given to edges of different parents; use tree.distinct_parents(edges)")
