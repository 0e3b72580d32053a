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

from flowalign.distributed.processes import Processes
from flowalign.models.base import Conditions, Policy
from flowalign.objectives import scalar_adjoint
from flowalign.rollouts.task import Task
from flowalign.trainers.base import AdamWConfig, Update
from samplers import HostRows, Rows, fetch, send


@dataclass(frozen=True, eq=False)
class States:
    """Distinct network inputs: x [S, *], their noise levels sigma [S], and rows [S], which condition row each has."""

    x: Tensor
    sigma: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def at(self, index: Tensor) -> States:
        """The states `index` [n], repeats allowed."""
        return States(self.x[index.to(self.x.device)], self.sigma[index], self.rows[index])


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


@dataclass(frozen=True, eq=False)
class UpdateEngine:
    """The engine of one batch: its conditions (rows of `States.rows`) and how many samples it has, which costs refer to.
    guidance_scale: of all velocities; None: that of the rollout."""

    task: Task
    conditions: Conditions
    images: int
    guidance_scale: float | None = None

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

    @torch.no_grad()
    def frozen(
        self, states: States, role: str | Sequence[str], guidance_scale: Mapping[str, float] | None = None
    ) -> tuple[Tensor, float]:
        """(v [S, *] on the host without graph, network rows per sample): each state evaluated once, by one process.

        role: one for all states, or one per state (routing: each state to its own teacher). guidance_scale: by role; the
        engine's for a role that is not named."""
        processes, before = self.task.processes, self.task.policy.evaluations
        roles = [role] * len(states) if isinstance(role, str) else list(role)
        if len(roles) != len(states):
            raise ValueError(f"got {len(roles)} roles for {len(states)} states; expected one for all, or one for each")
        share = processes.share(len(states))
        own = torch.arange(share.start, share.stop)
        scales = guidance_scale or {}
        found, order = HostRows(len(own)), list[Tensor]()
        for name in dict.fromkeys(roles):  # every process in the same order, also those without a state of this role
            wanted = torch.tensor([roles[row] == name for row in own.tolist()], dtype=torch.bool)
            for part in own[wanted].split(self.task.rollout.micro_batch) if bool(wanted.any()) else ():
                v = self.velocity(states.at(part), name, scales.get(name))
                found.add(v.to(torch.promote_types(states.x.dtype, v.dtype)))  # of a float64 policy on fp32 states
                order.append(part)
        values = _by_row(found.read(), torch.cat(order)) if order else states.x[:0].cpu()
        rows = processes.total(self.task.policy.evaluations - before)
        return processes.gather(values), rows / self.images

    def micro_batches(self, count: int, size: int, among: Tensor | None = None) -> list[Part]:
        """This process's parts of `count` states, at most `size` each: equally many, equally large on every process. among
        [count]: the states' numbers; None: 0 to count − 1."""
        dealt = self.task.processes.deal(count)
        parts = []
        for number, rows in enumerate(dealt.split(size) if len(dealt) else ()):
            index = rows.clamp(min=0)
            parts.append(Part(number, index if among is None else among[index], int((rows >= 0).sum())))
        return parts

    @torch.no_grad()
    def scalars(self, count: int, parts: Sequence[Part], value: Value, owner: Tensor | None = None) -> Tensor:
        """[E] float64 the numbers of `count` states without graph, over all processes. owner [E], value: see `coupled_update`."""
        owner = torch.arange(count) if owner is None else owner
        found = torch.zeros(len(owner), dtype=torch.float64)
        places = [part.place(owner) >= 0 for part in parts]
        values = [value(part)[: int(mine.sum())] for part, mine in zip(parts, places, strict=True)]
        for mine, numbers in zip(places, fetch(values), strict=True):
            found[mine] = numbers.double()
        return self.task.processes.gather(found[None]).sum(0)

    def coupled_update(
        self, trained: TrainedRole, count: int, size: int, value: Value, loss: Callable[[Tensor], Tensor], *,
        owner: Tensor | None = None, known: Tensor | None = None, weight: Tensor | None = None,
        metrics: Callable[[Tensor], dict[str, float]] = lambda numbers: {}, check: Check = lambda measures: None,
        measures: Measures | None = None,
    ) -> Update:  # fmt: skip
        """One optimizer step of a loss that couples all `count` states (pairs, groups) through numbers of each.

        value(part) [e]: the numbers (log-probs, errors) of a micro-batch of at most `size` states. loss: of all of them [E],
        float64. Two passes: the numbers without graph, then each micro-batch again with its adjoints; the gradient is that of
        one graph, the memory that of one micro-batch (see `scalar_adjoint`). The second pass leaves out states whose adjoints
        are all 0.

        owner [E]: the state that each number belongs to, of which a part gives those with part.place(owner) >= 0, in their
        order; None: one of each state, in the order of part.index. known [E]: the numbers, where the first pass would only
        repeat them. weight [E]: factors of the adjoints; if they are 1 in expectation (a random subset of states), so is the
        gradient the loss's. metrics: of the numbers of the first pass, once the step is taken. check, measures: see `update`."""
        before, owner = self.task.policy.evaluations, torch.arange(count) if owner is None else owner
        if known is None:
            known = self.scalars(count, self.micro_batches(count, size), value, owner)
        total, adjoint = scalar_adjoint(known, loss)
        adjoint = adjoint if weight is None else adjoint * weight
        rows = self.task.processes.total(self.task.policy.evaluations - before) / self.images
        states = owner[adjoint != 0].unique()
        parts = self.micro_batches(len(states), size, states)

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
