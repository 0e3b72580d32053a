"""The update engine: distinct states become dealt, padded and counted micro-batches of forward and backward.

Every trainer uses it, and no trainer deals, pads or counts by itself. A state is a network input; what a trainer makes of
the velocities there (a ratio, a regression, a distillation) is its own business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from flowalign.distributed.deal import Deal, union
from flowalign.distributed.processes import Processes
from flowalign.models.base import Policy
from flowalign.models.conditions import Conditions
from flowalign.objectives import scalar_adjoint
from flowalign.rollouts.task import Task
from flowalign.trainers.base import AdamWConfig, Update
from samplers import Forest, Held, HostBuffer, Rows, fetch, send


@dataclass(frozen=True, eq=False)
class States:
    """Distinct network inputs: x [S, *], their noise levels sigma [S], and rows [S], which condition row each has.

    row [S]: the row of each in x, where this process has only some of them (see samplers.Held); None: x has all."""

    x: Tensor
    sigma: Tensor
    rows: Tensor
    row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sigma)

    def at(self, index: Tensor) -> States:
        """The states `index` [n], repeats allowed."""
        x = self.x[index.to(self.x.device)] if self.row is None else Held(self.row, self.x).at(index)
        return States(x, self.sigma[index], self.rows[index])


@dataclass(frozen=True, eq=False)
class Part:
    """What this process does in its micro-batch `number`: the states `index` [n]. The first `real` are its own; the others repeat
    a state so that all processes call the network equally often, and weigh nothing."""

    number: int
    index: Tensor
    real: int

    def place(self, states: Tensor) -> Tensor:
        """Where in `index` each of `states` [E] lies, -1 for the states of other parts and processes."""
        largest = int(torch.cat([states, self.index]).max())
        place = torch.full((largest + 1,), -1)
        place[self.index[: self.real]] = torch.arange(self.real)
        return place[states]


@dataclass(eq=False)
class TrainedRole:
    """The weights of a role, their optimizer and its schedule. `updates` counts the steps taken: trainer state."""

    role: str
    config: AdamWConfig
    optimizer: Optimizer
    updates: int = 0

    @staticmethod
    def of(policy: Policy, config: AdamWConfig, role: str = "policy", updates: int = 0) -> TrainedRole:
        """With a new optimizer of the role's weights."""
        return TrainedRole(role, config, config.build(p for _, p in policy.parameters_of(role)), updates)


@dataclass(eq=False)
class Measures:
    """What the micro-batches of one update measured: tensors by name, in the order of the calls. Reading rows and totals is
    collective.

    counted: network rows by what they were for, "trained" those of a forward and a backward; what a backward computes again
    is not counted."""

    processes: Processes
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=lambda: {"trained": 0})

    def add(self, **values: Tensor) -> None:
        """Rows [n], or a number; without a graph."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def count(self, **rows: int) -> None:
        """Network rows that a loss spent on something else than a forward and a backward of the trained role: they are in
        cost/<name>_per_image, and not in cost/trained_per_image. Every process counts the same names."""
        for name, count in rows.items():
            self.counted[name] = self.counted.get(name, 0) + count
            self.counted["trained"] -= count

    def fetch(self, more: Sequence[Tensor] = ()) -> list[Tensor]:
        """Moves what was measured to the host, and returns `more` there too; by one copy."""
        places = [(name, number) for name, values in self.values.items() for number in range(len(values))]
        found = fetch([*(self.values[name][number] for name, number in places), *more])
        for (name, number), value in zip(places, found, strict=False):
            self.values[name][number] = value
        return found[len(places) :]

    def rows(self, name: str) -> Tensor:
        """All rows of all processes, float64."""
        return self.processes.gather(torch.cat(self.values[name])).double()

    def total(self, name: str) -> float:
        """The sum of the numbers."""
        return self.processes.total(sum(float(value) for value in self.values[name]))


Value = Callable[[Part], Tensor]
Loss = Callable[[Part, Measures], Tensor]
Check = Callable[[Measures], None]
Metrics = Callable[[Measures], dict[str, float]]


@dataclass(eq=False)
class UpdateEngine:
    """The engine of one batch: its conditions (rows of `States.rows`), of which `deal` adds what other processes encoded, and how
    many samples it has, which costs refer to. guidance_scale: of all velocities; None: that of the rollout. groups: how many
    the batch has; None: one for each condition row."""

    task: Task
    conditions: Conditions
    images: int
    guidance_scale: float | None = None
    groups: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the network works."""
        return self.conditions.device

    def velocity(self, states: States, role: str = "policy", guidance_scale: float | None = None) -> Tensor:
        """v [n, *] under the weights of `role`, with graph if gradients are on. guidance_scale: None is the engine's; one other
        than 1 needs conditions with negatives."""
        policy, rollout = self.task.policy, self.task.rollout
        own = rollout.guidance_scale if self.guidance_scale is None else self.guidance_scale
        scale = own if guidance_scale is None else guidance_scale
        x, sigma, rows = states.x, states.sigma, states.rows
        if x.device != self.device:
            x, sigma, rows = send(self.device, x, sigma, rows)
        with policy.role(role):
            return policy.velocity(
                x, sigma, self.conditions.rows(rows), guidance_scale=scale, detach_uncond=rollout.detach_uncond
            )

    def deal(self, group: Tensor) -> Deal:
        """Who trains which of the states of the groups `group` [S]: see Deal; with the conditions of those that this process gets.
        Collective. The conditions are a row for each group, or several times that."""
        processes, deal = self.task.processes, self.task.processes.deal(self.task.processes.owners(group))
        if processes.count > 1:
            of_row = torch.arange(len(self.conditions)) % (self.groups or len(self.conditions))
            wanted = [torch.isin(of_row, each).nonzero().flatten() for each in deal.wanted(group)]
            owner = processes.owners(of_row)
            self.conditions = self.conditions.each(lambda rows: processes.bring(rows, owner, wanted))
        return deal

    def bring(self, rows: Held, group: Tensor, wanted: Sequence[Tensor]) -> Held:
        """`rows` [N] with what each process wants of them (see Processes.bring), each from the process of its group [N]."""
        processes = self.task.processes
        return processes.bring(rows, processes.owners(group), wanted)

    def bring_states(self, forest: Forest, nodes: Sequence[Tensor], edges: Sequence[Tensor]) -> Forest:
        """The forest with, on each process, the states of its `nodes`, what the rollout found at them (its velocities, the
        gradients that guided it), and the states that its `edges` arrive at."""
        group, guidance = forest.tree.group, self.task.rollout.reward_guidance
        states = self.bring(Held(forest.row, forest.states), group, union(nodes, edges))
        velocities = {
            role: self.bring(rows, group, [each[rows.known[each]] for each in nodes])
            for role, rows in forest.velocities.items()
        }
        forest = replace(forest, states=states.values, row=states.row, velocities=velocities)
        return (
            forest if guidance is None else guidance.replayed(forest, self.task.rollout.kernel, self.task.policy.path)
        )

    @torch.no_grad()
    def frozen(
        self, states: States, role: str | Sequence[str], guidance_scale: Mapping[str, float] | None = None,
        mine: Tensor | None = None,
    ) -> tuple[Held, float]:  # fmt: skip
        """(v [S, *] on the host without graph, network rows per sample): each state evaluated once, by the process that trains it.

        role: one for all states, or one per state (routing: each state to its own teacher). guidance_scale: by role; the
        engine's for a role that is not named. mine [k], ascending: the states of this process, whose velocities it gets; None: all."""
        processes, before = self.task.processes, self.task.policy.evaluations
        roles = [role] * len(states) if isinstance(role, str) else list(role)
        if len(roles) != len(states):
            raise ValueError(f"got {len(roles)} roles for {len(states)} states; expected one for all, or one for each")
        here = torch.ones(len(states), dtype=torch.bool)
        if mine is not None:
            here = torch.zeros_like(here).index_fill(0, mine, True)
        own, scales = here.nonzero().flatten(), guidance_scale or {}
        found, order = HostBuffer(len(own)), list[Tensor]()
        for name in dict.fromkeys(roles):  # every process in the same order, also those without a state of this role
            wanted = torch.tensor([roles[row] == name for row in own.tolist()], dtype=torch.bool)
            for part in wanted.nonzero().flatten().split(self.task.rollout.micro_batch) if bool(wanted.any()) else ():
                v = self.velocity(states.at(own[part]), name, scales.get(name))
                found.add(v.to(torch.promote_types(states.x.dtype, v.dtype)))  # of a float64 policy on fp32 states
                order.append(part)
        values = _by_row(found.read(), torch.cat(order)) if order else states.x[:0].cpu()
        rows = processes.total(self.task.policy.evaluations - before)
        return Held.of(values, here), rows / self.images

    def micro_batches(self, deal: Deal, size: int) -> list[Part]:
        """This process's parts of the states that are dealt, at most `size` each: equally many, equally large on every process."""
        index, real = deal.padded[deal.rank], len(deal.rows[deal.rank])
        return [
            Part(number, part, min(len(part), max(0, real - number * size)))
            for number, part in enumerate(index.split(size) if len(index) else ())
        ]

    @torch.no_grad()
    def scalars(self, deal: Deal, parts: Sequence[Part], value: Value, owner: Tensor | None = None) -> Tensor:
        """[E] float64 the numbers of the states that are dealt, without graph, over all processes. owner [E], value: see
        `coupled_update`."""
        owner = torch.arange(len(deal)) if owner is None else owner
        found = torch.zeros(len(owner), dtype=torch.float64)
        places = [part.place(owner) >= 0 for part in parts]
        values = [value(part)[: int(mine.sum())] for part, mine in zip(parts, places, strict=True)]
        for mine, numbers in zip(places, fetch(values), strict=True):
            found[mine] = numbers.double()
        return self.task.processes.gather(found[None]).sum(0)

    def coupled_update(
        self, trained: TrainedRole, deal: Deal, size: int, value: Value, loss: Callable[[Tensor], Tensor], *,
        owner: Tensor | None = None, known: Tensor | None = None, weight: Tensor | None = None,
        metrics: Callable[[Tensor], dict[str, float]] = lambda numbers: {}, check: Check = lambda measures: None,
        measures: Measures | None = None,
    ) -> Update:  # fmt: skip
        """One optimizer step of a loss that couples all the states of a `deal` (pairs, groups) through numbers of each.

        value(part) [e]: the numbers (log-probs, errors) of a micro-batch of at most `size` states. loss: of all of them [E],
        float64. Two passes: the numbers without graph, then each micro-batch again with its adjoints; the gradient is that of
        one graph, the memory that of one micro-batch (see `scalar_adjoint`). The second pass leaves out states whose adjoints
        are all 0, and lets each other one stay on its process.

        owner [E]: the state that each number belongs to, of which a part gives those with part.place(owner) >= 0, in their
        order; None: one of each state, in the order of part.index. known [E]: the numbers, where the first pass would only
        repeat them. weight [E]: factors of the adjoints; if they are 1 in expectation (a random subset of states), so is the
        gradient the loss's. metrics: of the numbers of the first pass, once the step is taken. check, measures: see `update`."""
        before, owner = self.task.policy.evaluations, torch.arange(len(deal)) if owner is None else owner
        if known is None:
            known = self.scalars(deal, self.micro_batches(deal, size), value, owner)
        total, adjoint = scalar_adjoint(known, loss)
        adjoint = adjoint if weight is None else adjoint * weight
        rows = self.task.processes.total(self.task.policy.evaluations - before) / self.images
        parts = self.micro_batches(deal.only(owner[adjoint != 0].unique()), size)

        def share(part: Part, measures: Measures) -> Tensor:
            mine = part.place(owner) >= 0
            values = value(part)[: int(mine.sum())]
            (own,) = send(values.device, adjoint[mine].to(values.dtype))
            return (own * values).sum()

        update = self.update(trained, parts, share, lambda measures: metrics(known), check, measures)
        measured = {f"loss/{trained.role}": float(total), "cost/frozen_per_image": rows}
        return replace(update, after=lambda: measured | update.after())

    def update(
        self, trained: TrainedRole, parts: Sequence[Part], loss: Loss, metrics: Metrics = lambda measures: {},
        check: Check = lambda measures: None, measures: Measures | None = None,
    ) -> Update:  # fmt: skip
        """One optimizer step of `trained` on `parts`, the micro-batches of this process.

        loss(part, measures): the part's share of the loss, already divided by the global count; padding must weigh
        nothing. It must not call `frozen` or `scalars`, which wait for all processes, nor read a number of the device, which
        waits for it. check(measures): once all parts are done and before the step is taken; raises where it must not be.
        metrics(measures): once the step is taken; neither is asked where there was nothing to train. measures: where else something
        is measured that is read with it. An update is made and stepped before the next one is made: it sets
        the learning rate."""
        measures = measures or Measures(self.task.processes)
        learning_rate = trained.config.lr_at(trained.updates)
        for group in trained.optimizer.param_groups:
            group["lr"] = learning_rate
        began, unread = time.perf_counter(), [bool(parts)]

        def read(more: Sequence[Tensor] = ()) -> list[Tensor]:
            found, unread[0] = measures.fetch(more), False
            check(measures)
            return found

        def after() -> dict[str, float]:
            if unread[0]:  # whoever takes no step need not read
                read()
            measured = {
                "time/update": time.perf_counter() - began,
                **{
                    f"cost/{name}_per_image": self.task.processes.total(rows) / self.images
                    for name, rows in measures.counted.items()
                },
                "optim/lr" if trained.role == "policy" else f"optim/{trained.role}_lr": learning_rate,
            }
            if not parts:
                return measured
            trained.updates += 1
            return measured | metrics(measures)

        losses = [partial(self._counted, loss, part, measures) for part in parts]
        return Update(trained.optimizer, trained.config.max_grad_norm, losses, after, trained.role, read)

    def _counted(self, loss: Loss, part: Part, measures: Measures) -> Tensor:
        """The loss, its network rows counted."""
        before = self.task.policy.evaluations
        value = loss(part, measures)
        measures.counted["trained"] += self.task.policy.evaluations - before
        return value


def _by_row(values: Tensor, rows: Tensor) -> Tensor:
    """`values` [n, *] of the `rows` [n], all different, in ascending order of these."""
    order = rows.argsort()
    return Rows(order, order).of(values)
