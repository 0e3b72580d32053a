"""What a rollout returns: the kept states, the behavior log-probs, and the replay of any stored step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samplers.kernels.base import Kernel, Step, TransitionContext
from samplers.transfer import Rows, send
from samplers.trees import Tree

ELSEWHERE = -2  # in a row map: another process has it


@dataclass(frozen=True, eq=False)
class Held:
    """What N nodes (or states, samples, …) have of the size of a latent, such as one role's velocities: `values` [K, *], as far as
    this process has them. row [N]: the row of each in it; -1: there is none, ELSEWHERE: another process has it."""

    row: Tensor
    values: Tensor

    @staticmethod
    def of(values: Tensor, here: Tensor) -> "Held":
        """`values` [K, *] of those where `here` [N], in their order; another process has the others."""
        return Held(torch.where(here, here.cumsum(0) - 1, ELSEWHERE), values)

    def __len__(self) -> int:
        return len(self.row)

    @property
    def known(self) -> Tensor:
        """[N] which have one, on whichever process."""
        return self.row != -1

    @property
    def here(self) -> Tensor:
        """[N] which this process has."""
        return self.row >= 0

    def at(self, index: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Those of `index` [n]: [n, *], on `device` (None: where they are stored). ValueError for one that is not here."""
        rows = self.row[index]
        if bool((rows < 0).any()):
            raise ValueError(
                f"got numbers {index[rows < 0][:8].tolist()}, of which nothing is here; expected nodes, states or samples that have a value, "
                "such as those passed to Forest.with_velocities, and that this process rolled out or trains"
            )
        found = self.values[rows.to(self.values.device)]
        return found if device is None else send(device, found)[0]

    def pick(self, index: Tensor) -> "Held":
        """Those of `index` [n], here or not; nothing is copied."""
        return Held(self.row[index], self.values)

    def kept(self, alive: Tensor) -> "Held":
        """Those at the nodes of the mask `alive` [N], renumbered as Tree.keep does."""
        row, known = self.row[alive], self.row[alive] >= 0
        return Held(torch.where(known, known.cumsum(0) - 1, -1), self.values[row[known].to(self.values.device)])


@dataclass(frozen=True, eq=False)
class Forest:
    """A rolled-out tree.

    states [K, *]: those that are needed again (roots, both ends of every stochastic step, nodes without children; all
    with `keep="all"`), in the storage dtype; row [N]: the row of a node's state in it (-1: not kept). log_prob [N]: of the step that arrived
    at a node, under the policy that rolled out, taken after the storage cast; nan where the step is deterministic. All are
    on the host, whatever device rolled out: what a step is scored with goes to the device of the velocities. Of a forest that
    several processes rolled out, states and velocities stay where they are: see Held.
    evaluations: network rows of the rollout. previews: states that it completed for a selection. sigmas, kernel: those of
    the rollout, which every replay uses.
    velocities: of other networks (reference, old, teacher, …) at its states, by role. scores: of states (a latent
    process reward), by name, each [N], nan = not scored.
    """

    tree: Tree
    sigmas: Tensor
    kernel: Kernel
    states: Tensor
    row: Tensor
    log_prob: Tensor
    evaluations: int
    previews: int = 0
    velocities: Mapping[str, Held] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> Tensor:
        """[N] which nodes' states were kept."""
        return self.row != -1

    def mask(self, nodes: Tensor) -> Tensor:
        """[N] true at `nodes`."""
        chosen = torch.zeros(len(self.tree), dtype=torch.bool)
        chosen[nodes] = True
        return chosen

    def path_sum(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of `values` [N] over the stochastic steps from root to leaf, [L] in the order of tree.leaves.

        mask [N]: count only the steps arriving at these nodes.
        """
        if mask is not None:
            values = torch.where(mask.to(values.device), values, torch.zeros_like(values))
        return self.tree.path_sum(values)

    def at(self, nodes: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """States of `nodes` [n, *] on `device`, exactly what the rollout gave the network, in at least fp32.

        ValueError for a node that was not kept, or that another process has.
        """
        rows = self.row[nodes]
        if bool((rows == ELSEWHERE).any()):
            raise ValueError(
                f"got nodes {nodes[rows == ELSEWHERE][:8].tolist()}, whose states are on another process; expected those that this one "
                "rolled out or trains"
            )
        if bool((rows < 0).any()):
            missing = nodes[rows < 0][:8].tolist()
            raise ValueError(
                f"got nodes {missing}, whose states were not kept; expected roots, nodes without children or ends of a "
                'stochastic step: give the step a level, or take rollout(..., keep="all")'
            )
        return send(device, self.states[rows])[0].to(compute_dtype(self.states.dtype))

    def sigma(self, nodes: Tensor) -> Tensor:
        """Noise levels at which `nodes` sit [n]: what the network is evaluated at."""
        return self.sigmas[self.tree.index[nodes]]

    def step_sigmas(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """σ left and σ' reached by the steps arriving at `edges`, each [E]."""
        return self.sigma(self.tree.parent[edges]), self.sigma(edges)

    def with_velocities(self, role: str, nodes: Tensor, values: Tensor) -> "Forest":
        """This forest with the velocities `values` [n, *] of `role` at `nodes` [n]. A role is set once.

        Usually `nodes` are tree.distinct_parents(edges)[0]: one row serves all the steps that leave a state.
        """
        if role in self.velocities:
            raise ValueError(f"got the velocities of {role!r} twice; expected once per rollout: read forest.velocities")
        if values.shape != (len(nodes), *self.states.shape[1:]) or len(nodes.unique()) != len(nodes):
            raise ValueError(
                f"got velocities {list(values.shape)} for {len(nodes)} nodes ({len(nodes.unique())} distinct) and "
                f"states {list(self.states.shape[1:])}; expected one row per distinct node"
            )
        return self.with_role(role, nodes, Held(torch.arange(len(nodes)), values.detach()))

    def with_role(self, role: str, nodes: Tensor, found: Held) -> "Forest":
        """As `with_velocities`, of which this process may have some."""
        row = torch.full((len(self.tree),), -1, dtype=torch.int64)
        row[nodes] = found.row
        return replace(self, velocities={**self.velocities, role: Held(row, found.values)})

    def with_scores(self, name: str, values: Tensor) -> "Forest":
        """This forest with `values` [N] (nan = not scored) as the states' scores called `name`; set once."""
        if name in self.scores:
            raise ValueError(f"got the state scores {name!r} twice; expected once per rollout")
        if values.shape != (len(self.tree),):
            raise ValueError(f"got state scores {list(values.shape)}; expected one per node, [{len(self.tree)}]")
        return replace(self, scores={**self.scores, name: values.detach()})

    def role_steps(self, role: str, edges: Tensor, device: torch.device | str | None = None) -> Step:
        """The transitions arriving at `edges`, under the velocities of `role`, on `device` (None: where they are stored).
        ValueError for a role that is not known."""
        if role not in self.velocities:
            raise ValueError(
                f"got role {role!r}; known roles are {sorted(self.velocities)}: call with_velocities first"
            )
        parents, position = self.tree.distinct_parents(edges)
        return self.edge_steps(edges, self.velocities[role].at(parents, device), position)

    def edge_steps(
        self, edges: Tensor, velocity_of_parents: Tensor, parent_pos: Tensor | Rows, states_of_parents: Tensor | None = None
    ) -> Step:  # fmt: skip
        """Replay: the transitions that arrived at `edges` [E], under new velocities.

        velocity_of_parents [P, *]: one row per distinct state. parent_pos [E]: which row each edge leaves, as
        tree.distinct_parents(edges) gives it, so that siblings share one forward and backward. Same kernel, σ, σ',
        level and arithmetic as the rollout: with unchanged velocities log_prob(self.at(edges)) repeats self.log_prob.
        states_of_parents [P, *]: self.at of the states of these rows, where it is beside the velocities already.
        """
        parents, device = self.tree.parent[edges], velocity_of_parents.device
        rows = Rows(parent_pos, *send(device, parent_pos)) if isinstance(parent_pos, Tensor) else parent_pos
        _check_positions(edges, parents, len(velocity_of_parents), rows.numbers)
        sigma, sigma_next = self.step_sigmas(edges)
        ctx = TransitionContext(
            level=self.tree.level[edges], roots=self.tree.root[edges], nodes=edges, parents=parents,
            step=self.tree.index[parents], replay=True,
        )  # fmt: skip
        x = self.at(parents, device) if states_of_parents is None else rows.of(states_of_parents)
        return self.kernel(x, rows.of(velocity_of_parents), sigma, sigma_next, ctx)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sampler arithmetic uses for states stored as `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _check_positions(edges: Tensor, parents: Tensor, rows: int, parent_pos: Tensor) -> None:
    if bool((parents < 0).any()):
        raise ValueError(f"got roots {edges[parents < 0][:8].tolist()}; expected nodes that a step arrives at")
    if parent_pos.shape != edges.shape or bool(((parent_pos < 0) | (parent_pos >= rows)).any()):
        raise ValueError(
            f"got parent_pos {list(parent_pos.shape)} for edges {list(edges.shape)} and {rows} velocity rows; expected "
            "one row number per edge: use tree.distinct_parents(edges)"
        )
    owner = torch.full((rows,), -1, dtype=parents.dtype)
    owner[parent_pos] = parents
    if bool((owner[parent_pos] != parents).any()):
        raise ValueError("got one velocity row for edges of different parents; expected one row per parent: use "
                         "tree.distinct_parents(edges)")  # fmt: skip
