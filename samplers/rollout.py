"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from samplers.forest import Forest, compute_dtype
from samplers.host_rows import HostRows
from samplers.kernels.base import Carry, Kernel, Step, TransitionContext
from samplers.schedules import check_sigmas, subgrid
from samplers.selection import Select, candidates, check_frontiers, choose, trained_part
from samplers.trees import Tree

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[Tree, Tensor], Tensor]
Keep = Literal["edges", "all"]


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
    select: Select | None = None,
    keep_velocities: bool = False,
    keep: Keep = "edges",
) -> Forest:
    """Rolls `tree` out from `x_start` [R, *] (one row per root) over `sigmas` [T+1], without gradient.

    velocity(x [n, *], sigma [n], root [n]) -> v [n, *]: called on distinct states of one generation, at most
    `micro_batch` rows at a time; root says which row of `x_start` (hence which condition) a state descends from.
    noise(tree, nodes) -> [n, *]: the draws of the stochastic steps that arrive at `nodes`, such as KeyedNoise.step.
    store_dtype: states are cast to it before log-probs are taken and before the next step, so that a replay sees the
    numbers of the rollout; the network gets them in at least fp32.
    select: drops states during the rollout, after completing them to previews in `select.preview_steps` deterministic
    steps of the kernel. The descendants of dropped states are not computed, and the forest's tree holds what is left
    (Tree.keep); its `evaluations` count all rows, those of previews too. The noise of the others is unchanged, and
    the velocity from which a preview sets out is not evaluated again.
    keep_velocities: the forest holds, as the role "old", the velocities at both ends of stochastic steps, where the network
    was evaluated.
    keep: which states the forest stores. "edges": those that an update, a decoder or a score reads later (roots, both
    ends of stochastic steps, nodes without children). "all": every state, so that Forest.at works at deterministic ones
    too; a group of G chains over T steps then takes G·(T+1) latents: 24 samples of SD3.5 at 1024 pixels (16·128·128,
    fp32: 1 MiB each) over 40 steps 984 MiB in place of 48 under a Deterministic plan.
    """
    _check(x_start, sigmas, tree, micro_batch, keep)
    if select is not None:
        check_frontiers(tree, select)
    among, tail = candidates(tree), ~trained_part(tree)
    needed, compute = _needed(tree, keep), compute_dtype(store_dtype)
    ends = torch.cat([tree.edges, tree.parents_of_edges])
    continued = torch.zeros(len(tree), dtype=torch.bool)
    log_prob = torch.full((len(tree),), torch.nan, dtype=compute, device=x_start.device)
    x, nodes, carry, evaluations, previews = x_start.to(store_dtype), tree.generations[0], None, 0, 0
    stored, old_velocities = HostRows(int(needed.sum())), HostRows(len(ends.unique()))
    old_nodes = torch.zeros(len(tree), dtype=torch.bool)
    for generation in (*tree.generations[1:], torch.empty(0, dtype=torch.int64)):
        frontier = _Frontier(velocity, x.to(compute), sigmas, tree, nodes, micro_batch)
        look = partial(frontier.previews, kernel, carry, tree, store_dtype)
        continued[nodes] = True if select is None else choose(select, tree, nodes, among, look)
        stored.add(x, (needed & continued)[nodes])
        children = generation[continued[tree.parent[generation]]]
        parents, position = tree.distinct_parents(children)
        rows = torch.searchsorted(nodes, parents)
        x_parents, v_parents = frontier.x[rows.to(x.device)], frontier.velocities(rows)
        evaluations, previews = evaluations + frontier.evaluations, previews + frontier.looked_at
        if keep_velocities:
            at_end = torch.isin(parents, ends)
            old_nodes[parents[at_end]] = True
            old_velocities.add(v_parents.to(torch.promote_types(v_parents.dtype, compute)), at_end)
        if not len(children):
            break
        row_of_child = position.to(x.device)
        history = None if carry is None else carry.rows(rows[position])
        step = transition(
            kernel, x_parents[row_of_child], v_parents[row_of_child], sigmas, tree, children, history, tail[children]
        )
        x = draw(step, tree, children, noise).to(store_dtype)
        carry, nodes = step.carry, children
        _write_log_probs(log_prob, step, x, tree, children)
    kept = needed & continued
    row = torch.where(kept, kept.cumsum(0) - 1, -1)
    # on the host too, and with them all rows above: what reads them waits for the device once per rollout
    forest = Forest(tree, sigmas, kernel, stored.rows, row, log_prob.cpu(), evaluations, previews)
    if keep_velocities:
        forest = forest.with_velocities("old", old_nodes.nonzero().flatten(), old_velocities.rows)
    return forest if select is None else _pruned(forest, continued)


def _check(x_start: Tensor, sigmas: Tensor, tree: Tree, micro_batch: int | None, keep: Keep) -> None:
    check_sigmas(sigmas)
    if len(sigmas) != tree.num_steps + 1:
        raise ValueError(f"got {len(sigmas)} sigmas for a tree of {tree.num_steps} steps; expected num_steps + 1")
    if x_start.ndim < 2 or len(x_start) != tree.num_roots:
        raise ValueError(
            f"got x_start {list(x_start.shape)}; expected [R, *] with one row per root, R = {tree.num_roots}"
        )
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"got micro_batch={micro_batch}; expected at least 1, or None for no limit")
    if keep not in ("edges", "all"):
        raise ValueError(f"got keep={keep!r}; expected 'edges' or 'all'")


def _needed(tree: Tree, keep: Keep) -> Tensor:
    """[N] whose states are stored: see `rollout`."""
    if keep == "all":
        return torch.ones(len(tree), dtype=torch.bool)
    needed = tree.parent < 0
    needed[tree.edges] = True
    needed[tree.parents_of_edges] = True
    childless = torch.ones(len(tree), dtype=torch.bool)
    childless[tree.evaluated] = False
    return needed | childless


def _pruned(forest: Forest, continued: Tensor) -> Forest:
    """The forest without the states that were dropped, their descendants, and what then leads to no leaf."""
    alive, tree = forest.tree.alive(continued), forest.tree.keep(continued)
    used = forest.row[alive & forest.kept]
    velocities = {role: velocities.of(alive) for role, velocities in forest.velocities.items()}
    return replace(
        forest,
        tree=tree,
        velocities=velocities,
        states=forest.states[used],
        row=torch.where(forest.kept[alive], forest.kept[alive].cumsum(0) - 1, -1),
        log_prob=forest.log_prob[alive],
    )


class _Frontier:
    """The states of one generation, their velocities, each evaluated once when it is first read, and their previews.

    evaluations: network rows so far. looked_at: how many previews were made."""

    def __init__(
        self, velocity: Velocity, x: Tensor, sigmas: Tensor, tree: Tree, nodes: Tensor, micro_batch: int | None
    ) -> None:
        self.x, self.evaluations, self.looked_at = x, 0, 0
        self._velocity, self._limit = velocity, micro_batch or max(len(nodes), 1)
        self._sigmas, self._sigma, self._root = sigmas, sigmas[tree.index[nodes]].to(x.device), tree.root[nodes]
        self._known = torch.zeros(len(nodes), dtype=torch.bool)
        self._v: Tensor | None = None

    def velocities(self, rows: Tensor) -> Tensor:
        """[n, *] at `rows` [n] of the generation."""
        new = rows[~self._known[rows]]
        for part in new.split(self._limit) if len(new) else ():
            on_device = part.to(self.x.device)
            v = self._call(self.x[on_device], self._sigma[on_device], part)
            self._v = self._v if self._v is not None else torch.empty_like(self.x, dtype=v.dtype)
            self._v[on_device], self._known[part] = v, True
        return self.x[:0] if self._v is None else self._v[rows.to(self.x.device)]

    def previews(
        self,
        kernel: Kernel,
        carry: Carry | None,
        tree: Tree,
        store_dtype: torch.dtype,
        nodes: Tensor,
        rows: Tensor,
        steps: int,
    ) -> Tensor:
        """[n, *] the states `rows` [n] of `nodes`, all at one grid index, completed in `steps` of the kernel's deterministic
        steps on the sub-grid of a probe. The first step takes the velocities of the states themselves."""
        here, x = int(tree.index[nodes[rows[0]]]), self.x[rows.to(self.x.device)]
        carry, self.looked_at = None if carry is None else carry.rows(rows), self.looked_at + len(rows)
        for number, there in enumerate(subgrid(here, tree.num_steps, steps)):
            v = self._completing(x, here, rows) if number else self.velocities(rows)
            ctx = TransitionContext(
                level=0.0, roots=self._root[rows], nodes=nodes[rows], parents=nodes[rows],
                step=torch.full_like(rows, here), carry=carry, preview=True,
            )  # fmt: skip
            step = kernel(x, v, self._sigmas[here], self._sigmas[there], ctx)
            x, carry, here = step.behavior.mean.to(store_dtype).to(self.x.dtype), step.carry, there
        return x

    def _completing(self, x: Tensor, index: int, rows: Tensor) -> Tensor:
        """Velocities [n, *] of x [n, *], at one grid index on the way from the states `rows` [n]."""
        sigma = self._sigmas[index].to(x.device).expand(len(x))
        parts = torch.arange(len(rows)).split(self._limit)
        return torch.cat([self._call(x[part.to(x.device)], sigma[: len(part)], rows[part]) for part in parts])

    def _call(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.evaluations += len(x)
        return checked(self._velocity, x, sigma, self._root[rows])


def checked(velocity: Velocity, x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
    """velocity(x, sigma, root). ValueError for another shape than that of the states x [n, *]."""
    v = velocity(x, sigma, root)
    if v.shape != x.shape:
        raise ValueError(f"got velocities {list(v.shape)} for states {list(x.shape)}; expected equal shapes")
    return v


def transition(
    kernel: Kernel,
    x: Tensor,
    v: Tensor,
    sigmas: Tensor,
    tree: Tree,
    children: Tensor,
    carry: Carry | None,
    tail: Tensor,
) -> Step:
    """The transitions that arrive at `children` [n], from their parents' states x and velocities v [n, *]."""
    parents = tree.parent[children]
    ctx = TransitionContext(
        level=tree.level[children], roots=tree.root[children], nodes=children, parents=parents,
        step=tree.index[parents], carry=carry, tail=tail,
    )  # fmt: skip
    return kernel(x, v, sigmas[tree.index[parents]], sigmas[tree.index[children]], ctx)


def draw(step: Step, tree: Tree, children: Tensor, noise: Noise) -> Tensor:
    """The next states; noise is drawn at stochastic steps only."""
    stochastic = tree.level[children] > 0
    if not bool(stochastic.any()):
        return step.behavior.mean
    draws = torch.zeros_like(step.behavior.mean)
    draws[stochastic.to(draws.device)] = noise(tree, children[stochastic]).to(draws)
    return step.sample(draws)


def _write_log_probs(log_prob: Tensor, step: Step, x: Tensor, tree: Tree, children: Tensor) -> None:
    """Sets `log_prob` [N] at the children of stochastic steps: of their states x as stored, under the policy."""
    stochastic = (tree.level[children] > 0).to(x.device)
    if bool(stochastic.any()):
        policy = step.policy
        rows = {name: vars(policy)[name][stochastic] for name in ("mean", "std", "velocity_coef", "step_size")}
        arrived = x[stochastic]
        log_prob[children.to(x.device)[stochastic]] = replace(policy, **rows).log_prob(arrived).to(log_prob)
