"""The steps of a generation part by part, so that a device holds two generations of states and what one part takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels.base import Carry
from samplers.transfer import Rows, send
from samplers.trees import Tree


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps from some states of a generation: the children that they arrive at (`mine` [c], ascending), which of the states each
    leaves (`left` [c]), which of them are `noisy` [s], and the noise [s, *] of these; None where there is none."""

    left: Rows
    mine: Rows
    noisy: Rows
    noise: Tensor | None

    def split(self, size: int) -> "Iterator[Steps]":
        """At most `size` at a time."""
        for first, (left, mine) in enumerate(zip(self.left.split(size), self.mine.split(size), strict=True)):
            bounds = size * torch.tensor([first, first + 1])
            begin, end = torch.searchsorted(self.noisy.numbers, bounds).tolist()
            noisy = Rows(self.noisy.numbers[begin:end] - first * size, self.noisy.there[begin:end] - first * size)
            yield Steps(left, mine, noisy, None if self.noise is None or begin == end else self.noise[begin:end])


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a generation's states, its `rows` [p], and all steps that leave them, as in `Steps`; on the host."""

    rows: Tensor
    left: Tensor
    mine: Tensor
    noisy: Tensor
    noise: Tensor | None

    def beside(self, x: Tensor, *more: Tensor) -> tuple[Rows, Steps, list[Tensor]]:
        """The rows, their steps and `more`, sent to the device of x by one copy."""
        numbers, noise = (self.rows, self.left, self.mine, self.noisy), [] if self.noise is None else [self.noise]
        sent = send(x.device, *numbers, *more, *noise)
        rows, left, mine, noisy = (Rows(*pair) for pair in zip(numbers, sent, strict=False))
        return rows, Steps(left, mine, noisy, sent[-1] if noise else None), sent[4 : 4 + len(more)]


def in_parts(
    tree: Tree, nodes: Tensor, children: Tensor, noise: Callable[[Tree, Tensor], Tensor], size: int
) -> Iterator[Part]:
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
        yield Part(rows[first : first + size], position[mine] - first, mine, noisy, eps)


class Arrivals:
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
