"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.forest import Forest, compute_dtype
from samplers.kernels.base import Carry, Kernel, Step, TransitionContext
from samplers.schedules import check_sigmas, subgrid
from samplers.selection import Select, candidates, check_frontiers, choose, trained_part
from samplers.transfer import HostRows, Rows, fetch, send
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
    among, needed = candidates(tree), _needed(tree, keep)
    continued = torch.zeros(len(tree), dtype=torch.bool)
    engine = _Engine(velocity, sigmas, tree, kernel, noise, micro_batch, store_dtype, ~trained_part(tree))
    record = _Record.of(tree, int(needed.sum()), keep_velocities)
    frontier = _Frontier(engine, record, tree.generations[0], x_start.to(store_dtype), None)
    del x_start  # so that only the frontier holds the first generation
    with torch.no_grad():
        for generation in (*tree.generations[1:], torch.empty(0, dtype=torch.int64)):
            nodes = frontier.nodes
            continued[nodes] = True if select is None else choose(select, tree, nodes, among, frontier.previews)
            children = generation[continued[tree.parent[generation]]]
            following = frontier.advance(children, (needed & continued)[nodes].nonzero().flatten())
            if following is None:
                break
            frontier = following
    log_prob = record.log_prob(frontier.x)
    kept = needed & continued
    row = torch.where(kept, kept.cumsum(0) - 1, -1)
    forest = Forest(tree, sigmas, kernel, record.states.rows, row, log_prob, record.evaluations, record.previews)
    if record.velocities is not None:
        forest = forest.with_velocities("old", record.evaluated.nonzero().flatten(), record.velocities.rows)
    return forest if select is None else _pruned(forest, continued)


@dataclass(frozen=True, eq=False)
class _Engine:
    """What every generation of a rollout needs, see `rollout`. tail [N]: see TransitionContext."""

    velocity: Velocity
    sigmas: Tensor
    tree: Tree
    kernel: Kernel
    noise: Noise
    micro_batch: int | None
    store_dtype: torch.dtype
    tail: Tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.store_dtype)


@dataclass(eq=False)
class _Record:
    """What a rollout leaves of N nodes, as it is made: stored states; velocities (None: they are not kept) at both `ends` [N] of
    stochastic steps, as far as they were `evaluated` [N]; log-probs of the steps to the nodes `drawn`, still on the device;
    network rows (evaluations), and how many states were completed (previews)."""

    states: HostRows
    velocities: HostRows | None
    ends: Tensor
    evaluated: Tensor
    drawn: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    evaluations: int = 0
    previews: int = 0

    @staticmethod
    def of(tree: Tree, states: int, keep_velocities: bool) -> "_Record":
        """For at most so many stored states."""
        ends, evaluated = torch.zeros(2, len(tree), dtype=torch.bool)
        ends[tree.edges] = ends[tree.parents_of_edges] = True
        return _Record(HostRows(states), HostRows(int(ends.sum())) if keep_velocities else None, ends, evaluated)

    def log_prob(self, last: Tensor) -> Tensor:
        """[N] in at least fp32, nan where nothing was drawn. Here the host waits, once per rollout: with a number of the `last` states
        all that was added before is there."""
        *log_probs, _ = fetch([*self.log_probs, last.flatten()[:1]])
        found = torch.full((len(self.ends),), torch.nan, dtype=compute_dtype(last.dtype))
        if log_probs:
            found[torch.cat(self.drawn)] = torch.cat(log_probs).to(found)
        return found


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


class _Arrivals:
    """What `count` steps arrive at, put together part by part: the states x [count, *] and what a multistep solver hands on."""

    def __init__(self, count: int) -> None:
        self._count, self._carries = count, list[tuple[Rows, Carry]]()
        self._x: Tensor | None = None

    @property
    def x(self) -> Tensor:
        assert self._x is not None
        return self._x

    @property
    def carry(self) -> Carry | None:
        """Of all of them; None where the solver hands nothing on."""
        return Carry.joined(self._carries)

    def add(self, rows: Rows, x: Tensor, carry: Carry | None) -> None:
        """x [n, *] at `rows` [n], ascending; it is not copied where it is all of them."""
        if carry is not None:
            self._carries.append((rows, carry))
        if len(rows) == self._count:
            self._x = x
            return
        if self._x is None:
            self._x = x.new_empty((self._count, *x.shape[1:]))
        self._x[rows.there] = x


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
    """The states x [n, *] of one generation, `nodes` [n], in the storage dtype; their velocities, each evaluated once; and their
    previews. carry: what the steps that arrived at them hand on."""

    def __init__(self, engine: _Engine, record: _Record, nodes: Tensor, x: Tensor, carry: Carry | None) -> None:
        self.nodes, self.x, self._carry = nodes, x, carry
        self._engine, self._record = engine, record
        self._limit = engine.micro_batch or max(len(nodes), 1)
        self._together = len(engine.tree) if x.device.type == "cpu" else self._limit  # states that are stepped at once
        self._known = torch.zeros(len(nodes), dtype=torch.bool)
        self._v: Tensor | None = None

    def advance(self, children: Tensor, kept: Tensor) -> "_Frontier | None":
        """The generation of `children` [m], rolled out; None without any. kept [k]: rows of the states to be stored."""
        engine, arrivals = self._engine, _Arrivals(len(children))
        if not len(children):
            self._record.states.add(Rows.beside(self.x, kept).of(self.x))
            return None
        for part in _parts(engine.tree, self.nodes, children, engine.noise, self._together):
            self._advance(part, children, kept, arrivals)
            kept = kept[:0]  # stored with the first part
        return _Frontier(engine, self._record, children, arrivals.x, arrivals.carry)

    def _advance(self, part: _Part, children: Tensor, kept: Tensor, arrivals: _Arrivals) -> None:
        """The steps of a part. What it needs of the host goes to the device at once, and nothing waits for the device."""
        engine, record, nodes = self._engine, self._record, self.nodes[part.rows]
        level, at_ends = engine.sigmas[engine.tree.index[nodes]], kept[:0]
        if record.velocities is not None:
            at_ends = record.ends[nodes].nonzero().flatten()
        rows, steps, (sigma, ends_there, kept_there) = part.beside(self.x, level, at_ends, kept)
        record.states.add(Rows(kept, kept_there).of(self.x))
        v = self._velocities(rows, sigma)
        if record.velocities is not None:
            record.evaluated[nodes[at_ends]] = True
            stored = v.to(torch.promote_types(v.dtype, engine.compute_dtype))
            record.velocities.add(Rows(at_ends, ends_there).of(stored))
        # of siblings a guide is asked once
        apart = len(steps.mine) > self._together and not engine.kernel.uses_roots
        for some in steps.split(self._together) if apart else [steps]:
            self._take(some, rows, v, children, arrivals)

    def _take(self, steps: _Steps, rows: Rows, v: Tensor, children: Tensor, arrivals: _Arrivals) -> None:
        """Takes `steps` from the states `rows` [p], whose velocities are v [p, *]."""
        engine, here, arrived = self._engine, rows.then(steps.left), children[steps.mine.numbers]
        step = transition(
            engine.kernel, here.of(self.x).to(engine.compute_dtype), steps.left.of(v), engine.sigmas, engine.tree, arrived,
            None if self._carry is None else self._carry.rows(here), engine.tail[arrived],
        )  # fmt: skip
        x, log_prob = _drawn(step, steps, engine.store_dtype)
        arrivals.add(steps.mine, x, step.carry)
        if log_prob is not None:
            self._record.drawn.append(arrived[steps.noisy.numbers])
            self._record.log_probs.append(log_prob)

    def _velocities(self, rows: Rows, sigma: Tensor) -> Tensor:
        """[n, *] at the `rows` [n], all different, of levels sigma [n]; those of a preview are known."""
        known = self._known[rows.numbers]
        if not bool(known.any()):
            parts = zip(rows.split(self._limit), sigma.split(self._limit), strict=True)
            found = [self._call(part.of(self.x), level, part.numbers) for part, level in parts]
            return found[0] if len(found) == 1 else torch.cat(found)
        self._remember(rows.numbers[~known])
        assert self._v is not None
        return rows.of(self._v)

    def _remember(self, numbers: Tensor) -> None:
        """Evaluates the states at the rows `numbers` [n] of the host, which are not known."""
        rows, levels = Rows.beside(self.x, numbers), self._engine.sigmas[self._engine.tree.index[self.nodes[numbers]]]
        (sigma,) = send(self.x.device, levels)
        for part, level in zip(rows.split(self._limit), sigma.split(self._limit), strict=False):
            v = self._call(part.of(self.x), level, part.numbers)
            self._v = torch.empty_like(self.x, dtype=v.dtype) if self._v is None else self._v
            self._v[part.there] = v
            self._known[part.numbers] = True

    def previews(self, nodes: Tensor, rows: Tensor, steps: int) -> Tensor:
        """[k, *] the states `rows` [k] of `nodes`, all at one grid index, completed in `steps` of the kernel's deterministic
        steps on the sub-grid of a probe. The first step takes the velocities of the states themselves."""
        engine, looked_at = self._engine, Rows.beside(self.x, rows)
        compute, roots = engine.compute_dtype, engine.tree.root[nodes[rows]]
        here, x = int(engine.tree.index[nodes[rows[0]]]), looked_at.of(self.x).to(compute)
        carry = None if self._carry is None else self._carry.rows(looked_at)
        self._record.previews += len(rows)
        levels = subgrid(here, engine.tree.num_steps, steps)
        if levels:
            self._remember(rows[~self._known[rows]])
        for number, there in enumerate(levels):
            v = self._completing(x, here, rows) if number or self._v is None else looked_at.of(self._v)
            ctx = TransitionContext(
                level=0.0, roots=roots, nodes=nodes[rows], parents=nodes[rows], step=torch.full_like(rows, here), carry=carry,
                preview=True,
            )  # fmt: skip
            step = engine.kernel(x, v, engine.sigmas[here], engine.sigmas[there], ctx)
            x, carry, here = step.behavior.mean.to(engine.store_dtype).to(compute), step.carry, there
        return x

    def _completing(self, x: Tensor, index: int, rows: Tensor) -> Tensor:
        """Velocities [n, *] of x [n, *], at one grid index on the way from the states `rows` [n]."""
        sigmas = self._engine.sigmas
        sigma = x.new_full((len(x),), float(sigmas[index]), dtype=sigmas.dtype)
        parts = zip(*(values.split(self._limit) for values in (x, sigma, rows)), strict=True)
        return torch.cat([self._call(*part) for part in parts])

    def _call(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Of the states `rows` [n] of the host, or of others that come from them."""
        self._record.evaluations += len(x)
        root = self._engine.tree.root[self.nodes[rows]]
        return checked(self._engine.velocity, x.to(self._engine.compute_dtype), sigma, root)


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
