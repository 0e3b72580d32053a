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
from samplers.transfer import Rows, fetch, send
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
    x, nodes, carry, evaluations, previews = x_start.to(store_dtype), tree.generations[0], None, 0, 0
    stored, old_velocities = HostRows(int(needed.sum())), HostRows(len(ends.unique()))
    old_nodes, drawn_nodes, log_probs = torch.zeros(len(tree), dtype=torch.bool), list[Tensor](), list[Tensor]()
    for generation in (*tree.generations[1:], torch.empty(0, dtype=torch.int64)):
        frontier = _Frontier(velocity, x.to(compute), sigmas, tree, nodes, micro_batch)
        look = partial(frontier.previews, kernel, carry, tree, store_dtype)
        continued[nodes] = True if select is None else choose(select, tree, nodes, among, look)
        children = generation[continued[tree.parent[generation]]]
        parents, position = tree.distinct_parents(children)
        rows, stochastic = torch.searchsorted(nodes, parents), (tree.level[children] > 0).nonzero().flatten()
        kept, at_end = (needed & continued)[nodes].nonzero().flatten(), rows[torch.isin(parents, ends)]
        drawn = [noise(tree, children[stochastic])] if len(stochastic) else []
        # all that this generation needs of the host, before the network is called: nothing below waits for the device
        on_device = frontier.send(kept, at_end, rows, rows[position], stochastic, *drawn)
        kept, at_end, rows, left, noisy = map(Rows, (kept, at_end, rows, rows[position], stochastic), on_device)
        stored.add(kept.of(x))
        v = frontier.velocities(rows)
        evaluations, previews = evaluations + frontier.evaluations, previews + frontier.looked_at
        if keep_velocities:
            old_nodes[nodes[at_end.numbers]] = True
            old_velocities.add(at_end.of(v.to(torch.promote_types(v.dtype, compute))))
        if not len(children):
            break
        history = None if carry is None else carry.rows(left)
        step = transition(kernel, left.of(frontier.x), left.of(v), sigmas, tree, children, history, tail[children])
        x = draw(step, noisy, *on_device[5:]).to(store_dtype)
        if len(stochastic):
            drawn_nodes.append(children[stochastic])
            log_probs.append(step.policy.rows(noisy).log_prob(noisy.of(x)))
        carry, nodes = step.carry, children
    # once per rollout the host waits: with these numbers all rows above are there
    *log_probs, _ = fetch([*log_probs, x.flatten()[:1]])
    log_prob = torch.full((len(tree),), torch.nan, dtype=compute)
    if drawn_nodes:
        log_prob[torch.cat(drawn_nodes)] = torch.cat(log_probs).to(compute)
    kept_nodes = needed & continued
    row = torch.where(kept_nodes, kept_nodes.cumsum(0) - 1, -1)
    forest = Forest(tree, sigmas, kernel, stored.rows, row, log_prob, evaluations, previews)
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
        self._sigmas, self._sigma, self._root = sigmas, sigmas[tree.index[nodes]], tree.root[nodes]
        self._known = torch.zeros(len(nodes), dtype=torch.bool)
        self._v: Tensor | None = None

    def send(self, *tensors: Tensor) -> list[Tensor]:
        """`tensors` beside the states, by one copy; with it go the noise levels of these."""
        self._sigma, *sent = send(self.x.device, self._sigma, *tensors)
        return sent

    def velocities(self, rows: Rows) -> Tensor:
        """Those of the generation, [N, *], known at `rows`; elsewhere anything."""
        unknown = ~self._known[rows.numbers]
        new = rows if bool(unknown.all()) else self._rows(rows.numbers[unknown])
        for part in new.split(self._limit):
            v = self._call(part.of(self.x), part.of(self._sigma), part.numbers)
            if part.all_of(self.x):
                self._v = v
            else:
                self._v = self._v if self._v is not None else torch.empty_like(self.x, dtype=v.dtype)
                self._v[part.there] = v
            self._known[part.numbers] = True
        return self.x if self._v is None else self._v

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
        looked_at = self._rows(rows)
        here, x = int(tree.index[nodes[rows[0]]]), looked_at.of(self.x)
        carry, self.looked_at = None if carry is None else carry.rows(looked_at), self.looked_at + len(rows)
        for number, there in enumerate(subgrid(here, tree.num_steps, steps)):
            v = self._completing(x, here, rows) if number else looked_at.of(self.velocities(looked_at))
            ctx = TransitionContext(
                level=0.0, roots=self._root[rows], nodes=nodes[rows], parents=nodes[rows],
                step=torch.full_like(rows, here), carry=carry, preview=True,
            )  # fmt: skip
            step = kernel(x, v, self._sigmas[here], self._sigmas[there], ctx)
            x, carry, here = step.behavior.mean.to(store_dtype).to(self.x.dtype), step.carry, there
        return x

    def _rows(self, numbers: Tensor) -> Rows:
        return Rows(numbers, *self.send(numbers))

    def _completing(self, x: Tensor, index: int, rows: Tensor) -> Tensor:
        """Velocities [n, *] of x [n, *], at one grid index on the way from the states `rows` [n]."""
        sigma = x.new_full((len(x),), float(self._sigmas[index]), dtype=self._sigmas.dtype)
        parts = self._rows(torch.arange(len(rows))).split(self._limit)
        return torch.cat([self._call(part.of(x), sigma[: len(part)], rows[part.numbers]) for part in parts])

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


def draw(step: Step, noisy: Rows, noise: Tensor | None = None) -> Tensor:
    """The next states; noise [n, *] of the stochastic steps, the rows `noisy` [n], None if there are none."""
    mean = step.behavior.mean
    if noise is None:
        return mean
    if noisy.all_of(mean):
        return step.sample(noise)
    draws = torch.zeros_like(mean)
    draws[noisy.there] = noise.to(draws)
    return step.sample(draws)
