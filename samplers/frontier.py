"""One generation of a rollout: its states, their velocities, each evaluated once, their previews, and the step to the next one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.forest import compute_dtype
from samplers.generation_parts import Arrivals, Part, Steps, in_parts
from samplers.kernels.base import Carry, Kernel, Step, TransitionContext
from samplers.schedules import subgrid
from samplers.transfer import HostBuffer, Rows, fetch, send
from samplers.trees import Tree

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Noise = Callable[[Tree, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Engine:
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
class Record:
    """What a rollout leaves of N nodes, as it is made: stored states; velocities (None: they are not kept) at both `ends` [N] of
    stochastic steps, as far as they were `evaluated` [N]; log-probs of the steps to the nodes `drawn`, still on the device;
    network rows (evaluations), and how many states were completed (previews)."""

    states: HostBuffer
    velocities: HostBuffer | None
    ends: Tensor
    evaluated: Tensor
    drawn: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    evaluations: int = 0
    previews: int = 0

    @staticmethod
    def of(tree: Tree, states: int, keep_velocities: bool) -> "Record":
        """For at most so many stored states."""
        ends, evaluated = torch.zeros(2, len(tree), dtype=torch.bool)
        ends[tree.edges] = ends[tree.parents_of_edges] = True
        return Record(HostBuffer(states), HostBuffer(int(ends.sum())) if keep_velocities else None, ends, evaluated)

    def log_prob(self, last: Tensor) -> Tensor:
        """[N] in at least fp32, nan where nothing was drawn. Here the host waits, once per rollout: with a number of the `last` states
        all that was added before is there."""
        *log_probs, _ = fetch([*self.log_probs, last.flatten()[:1]])
        found = torch.full((len(self.ends),), torch.nan, dtype=compute_dtype(last.dtype))
        if log_probs:
            found[torch.cat(self.drawn)] = torch.cat(log_probs).to(found)
        return found


class Frontier:
    """The states x [n, *] of one generation, `nodes` [n], in the storage dtype; their velocities, each evaluated once; and their
    previews. carry: what the steps that arrived at them hand on."""

    def __init__(self, engine: Engine, record: Record, nodes: Tensor, x: Tensor, carry: Carry | None) -> None:
        self.nodes, self.x, self._carry = nodes, x, carry
        self._engine, self._record = engine, record
        self._limit = engine.micro_batch or max(len(nodes), 1)
        self._together = len(engine.tree) if x.device.type == "cpu" else self._limit  # states that are stepped at once
        self._known = torch.zeros(len(nodes), dtype=torch.bool)
        self._v: Tensor | None = None

    def advance(self, children: Tensor, kept: Tensor) -> "Frontier | None":
        """The generation of `children` [m], rolled out; None without any. kept [k]: rows of the states to be stored."""
        engine, arrivals = self._engine, Arrivals(len(children))
        if not len(children):
            self._record.states.add(Rows.beside(self.x, kept).of(self.x))
            return None
        for part in in_parts(engine.tree, self.nodes, children, engine.noise, self._together):
            self._advance(part, children, kept, arrivals)
            kept = kept[:0]  # stored with the first part
        return Frontier(engine, self._record, children, arrivals.x, arrivals.carry)

    def _advance(self, part: Part, children: Tensor, kept: Tensor, arrivals: Arrivals) -> None:
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

    def _take(self, steps: Steps, rows: Rows, v: Tensor, children: Tensor, arrivals: Arrivals) -> None:
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


def _drawn(step: Step, steps: Steps, store_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The states that `steps` arrive at, as they are stored, and the log-probs of the noisy ones under the policy; None without."""
    noisy, noise, mean = steps.noisy, steps.noise, step.behavior.mean
    if noise is None:
        return mean.to(store_dtype), None
    if not noisy.all_of(mean):
        noise = torch.zeros_like(mean).index_copy_(0, noisy.there, noise.to(mean))
    x = step.sample(noise).to(store_dtype)
    return x, step.policy.rows(noisy).log_prob(noisy.of(x))
