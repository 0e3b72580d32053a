"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

    On a device a generation is stepped in parts of `micro_batch` of its states, so that beside two generations of states there
    is what one part takes; no step waits for the device, and each part takes two copies of the host's numbers, its noise
    among them. On the host all steps of a generation are one part.

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
    continued, old_nodes = torch.zeros(2, len(tree), dtype=torch.bool)
    stored, old_velocities = HostRows(int(needed.sum())), HostRows(len(ends.unique()))
    drawn_nodes, log_probs = list[Tensor](), list[Tensor]()
    x, nodes, carry, evaluations, previews = x_start.to(store_dtype), tree.generations[0], None, 0, 0
    del x_start  # so that only x holds the first generation
    with torch.no_grad():
        for generation in (*tree.generations[1:], torch.empty(0, dtype=torch.int64)):
            frontier = _Frontier(velocity, x.to(compute), sigmas, tree, nodes, micro_batch)
            look = partial(frontier.previews, kernel, carry, tree, store_dtype)
            continued[nodes] = True if select is None else choose(select, tree, nodes, among, look)
            children = generation[continued[tree.parent[generation]]]
            kept = (needed & continued)[nodes].nonzero().flatten()
            reached, carries = None, list[tuple[Rows, Carry]]()
            for part in _parts(tree, nodes, children, noise, frontier.together):
                # what the part needs of the host goes to the device at once, and nothing waits for the device
                leaving, level = nodes[part.rows], sigmas[tree.index[nodes[part.rows]]]
                at_end = torch.isin(leaving, ends).nonzero().flatten() if keep_velocities else kept[:0]
                rows, steps, (sigma, ends_there, kept_there) = part.beside(x, level, at_end, kept)
                stored.add(Rows(kept, kept_there).of(x))
                kept = kept[:0]  # with the first part
                v = frontier.velocities(rows, sigma)
                if keep_velocities:
                    old_nodes[leaving[at_end]] = True
                    old_velocities.add(Rows(at_end, ends_there).of(v.to(torch.promote_types(v.dtype, compute))))
                apart = (
                    len(steps.mine) > frontier.together and not kernel.uses_roots
                )  # of siblings a guide is asked once
                for some in steps.split(frontier.together) if apart else [steps]:
                    here, own = rows.then(some.left), children[some.mine.numbers]
                    history = None if carry is None else carry.rows(here)
                    step = transition(
                        kernel, here.of(frontier.x), some.left.of(v), sigmas, tree, own, history, tail[own]
                    )
                    drawn, log_prob = _drawn(step, some, store_dtype)
                    reached = _put(reached, len(children), some.mine, drawn)
                    if log_prob is not None:
                        drawn_nodes.append(own[some.noisy.numbers])
                        log_probs.append(log_prob)
                    if step.carry is not None:
                        carries.append((some.mine, step.carry))
                    del step, drawn
                del steps, some, v, sigma  # before the next part takes as much
            evaluations, previews = evaluations + frontier.evaluations, previews + frontier.looked_at
            if reached is None:
                stored.add(Rows.beside(x, kept).of(x))
                break
            x, nodes, carry = reached, children, Carry.joined(carries)
    # once per rollout the host waits: with these numbers all rows above are there
    *log_probs, _ = fetch([*log_probs, x.flatten()[:1]])
    all_log_probs = torch.full((len(tree),), torch.nan, dtype=compute)
    if drawn_nodes:
        all_log_probs[torch.cat(drawn_nodes)] = torch.cat(log_probs).to(compute)
    kept_nodes = needed & continued
    row = torch.where(kept_nodes, kept_nodes.cumsum(0) - 1, -1)
    forest = Forest(tree, sigmas, kernel, stored.rows, row, all_log_probs, evaluations, previews)
    if keep_velocities:
        forest = forest.with_velocities("old", old_nodes.nonzero().flatten(), old_velocities.rows)
    return forest if select is None else _pruned(forest, continued)


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps from some states of a generation: the children that they arrive at (`mine` [c], ascending), which of the states each
    leaves (`left` [c]), which of them are `noisy` [s], and the noise [s, *] of these; None where there is none."""

    left: Rows
    mine: Rows
    noisy: Rows
    noise: Tensor | None

    def split(self, size: int) -> "Iterator[_Steps]":
        """At most `size` at a time."""
        for first, (left, mine) in enumerate(zip(self.left.split(size), self.mine.split(size), strict=True)):
            begin, end = torch.searchsorted(
                self.noisy.numbers, torch.tensor([first * size, (first + 1) * size])
            ).tolist()
            noisy = Rows(self.noisy.numbers[begin:end] - first * size, self.noisy.there[begin:end] - first * size)
            yield _Steps(left, mine, noisy, None if self.noise is None or begin == end else self.noise[begin:end])


@dataclass(frozen=True, eq=False)
class _Part:
    """Some of a generation's states, its `rows` [p], and all steps that leave them, as in `_Steps`; on the host."""

    rows: Tensor
    left: Tensor
    mine: Tensor
    noisy: Tensor
    noise: Tensor | None

    def beside(self, x: Tensor, *more: Tensor) -> tuple[Rows, _Steps, list[Tensor]]:
        """The rows, their steps and `more`, sent to the device of x by one copy."""
        numbers, noise = (self.rows, self.left, self.mine, self.noisy), [] if self.noise is None else [self.noise]
        sent = send(x.device, *numbers, *more, *noise)
        rows, left, mine, noisy = (Rows(*pair) for pair in zip(numbers, sent, strict=False))
        return rows, _Steps(left, mine, noisy, sent[-1] if noise else None), sent[4 : 4 + len(more)]


def _parts(tree: Tree, nodes: Tensor, children: Tensor, noise: Noise, size: int) -> Iterator[_Part]:
    """The steps from `nodes`, a generation, to `children` [n], those from `size` states at a time; siblings stay together."""
    parents, position = tree.distinct_parents(children)
    rows, stochastic = torch.searchsorted(nodes, parents), tree.level[children] > 0
    drawn = noise(tree, children[stochastic]) if bool(stochastic.any()) else None
    for first in range(0, len(parents), size):
        mine = ((position >= first) & (position < first + size)).nonzero().flatten()
        noisy, eps = stochastic[mine].nonzero().flatten(), None
        if drawn is not None and len(noisy):
            place = (stochastic.cumsum(0) - 1)[mine[noisy]]
            eps = Rows(place, place).of(drawn)
        yield _Part(rows[first : first + size], position[mine] - first, mine, noisy, eps)


def _put(into: Tensor | None, count: int, rows: Rows, values: Tensor) -> Tensor:
    """`into` [count, *], made if it is None, with `values` [n, *] at `rows` [n]; themselves where they are all of it."""
    if len(rows) == count:  # ascending, so in order
        return values
    into = values.new_empty((count, *values.shape[1:])) if into is None else into
    into[rows.there] = values
    return into


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
    velocities = {role: velocities.kept(alive) for role, velocities in forest.velocities.items()}
    return replace(
        forest,
        tree=tree,
        velocities=velocities,
        states=forest.states[used],
        row=torch.where(forest.kept[alive], forest.kept[alive].cumsum(0) - 1, -1),
        log_prob=forest.log_prob[alive],
    )


class _Frontier:
    """The states of one generation, their velocities, each evaluated once, and their previews.

    evaluations: network rows so far. looked_at: how many previews were made. together: of how many states the steps are taken
    at once."""

    def __init__(
        self, velocity: Velocity, x: Tensor, sigmas: Tensor, tree: Tree, nodes: Tensor, micro_batch: int | None
    ) -> None:
        self.x, self.evaluations, self.looked_at = x, 0, 0
        self._velocity, self._limit = velocity, micro_batch or max(len(nodes), 1)
        self.together = len(tree) if x.device.type == "cpu" else self._limit
        self._sigmas, self._index, self._root = sigmas, tree.index[nodes], tree.root[nodes]
        self._known = torch.zeros(len(nodes), dtype=torch.bool)
        self._v: Tensor | None = None

    def velocities(self, rows: Rows, sigma: Tensor) -> Tensor:
        """[n, *] at the `rows` [n], all different, of levels sigma [n]; those of a preview are known."""
        known = self._known[rows.numbers]
        if not bool(known.any()):
            parts = zip(rows.split(self._limit), sigma.split(self._limit), strict=True)
            found = [self._call(part.of(self.x), level, part.numbers) for part, level in parts]
            return found[0] if len(found) == 1 else torch.cat(found)
        self._remember(Rows.beside(self.x, rows.numbers[~known]))
        assert self._v is not None
        return rows.of(self._v)

    def _remember(self, rows: Rows) -> None:
        """Evaluates states that are not known."""
        (sigma,) = send(self.x.device, self._sigmas[self._index[rows.numbers]])
        for part, level in zip(rows.split(self._limit), sigma.split(self._limit), strict=False):
            v = self._call(part.of(self.x), level, part.numbers)
            self._v = torch.empty_like(self.x, dtype=v.dtype) if self._v is None else self._v
            self._v[part.there] = v
            self._known[part.numbers] = True

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
        looked_at = Rows.beside(self.x, rows)
        here, x = int(tree.index[nodes[rows[0]]]), looked_at.of(self.x)
        carry, self.looked_at = None if carry is None else carry.rows(looked_at), self.looked_at + len(rows)
        levels = subgrid(here, tree.num_steps, steps)
        if levels:
            self._remember(Rows.beside(self.x, rows[~self._known[rows]]))
        for number, there in enumerate(levels):
            v = self._completing(x, here, rows) if number or self._v is None else looked_at.of(self._v)
            ctx = TransitionContext(
                level=0.0, roots=self._root[rows], nodes=nodes[rows], parents=nodes[rows],
                step=torch.full_like(rows, here), carry=carry, preview=True,
            )  # fmt: skip
            step = kernel(x, v, self._sigmas[here], self._sigmas[there], ctx)
            x, carry, here = step.behavior.mean.to(store_dtype).to(self.x.dtype), step.carry, there
        return x

    def _completing(self, x: Tensor, index: int, rows: Tensor) -> Tensor:
        """Velocities [n, *] of x [n, *], at one grid index on the way from the states `rows` [n]."""
        sigma = x.new_full((len(x),), float(self._sigmas[index]), dtype=self._sigmas.dtype)
        parts = zip(*(values.split(self._limit) for values in (x, sigma, rows)), strict=True)
        return torch.cat([self._call(*part) for part in parts])

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


def _drawn(step: Step, steps: _Steps, store_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The states that `steps` arrive at, as they are stored, and the log-probs of the noisy ones under the policy; None without."""
    noisy, noise, mean = steps.noisy, steps.noise, step.behavior.mean
    if noise is None:
        return mean.to(store_dtype), None
    if not noisy.all_of(mean):
        noise = torch.zeros_like(mean).index_copy_(0, noisy.there, noise.to(mean))
    x = step.sample(noise).to(store_dtype)
    return x, step.policy.rows(noisy).log_prob(noisy.of(x))
