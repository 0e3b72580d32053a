"""The processes of a run: which share of the work each does, and how the shares become one batch again.

The rollout is dealt by group, the update by state. Everything in between (credit, advantages, selection) is computed by
every process on the whole batch, so all agree without communication; gradients are summed once per optimizer step. That
needs no hooks in the network: processes may run different numbers of forwards and backwards without waiting for each
other. Where the network's weights are sharded they cannot, and `level` synchronizes them (flowalign.distributed.fsdp2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather, reduce
from torch import Tensor
from torch.nn import Parameter


def _nothing() -> None:
    """Processes whose networks are not sharded need no synchronization."""


@dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `rank`; by default the only one. Every method but `shares` and `deal`
    is collective: all processes must call it, in the same order. Each begins with `level`."""

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    level: Callable[[], None] = _nothing

    @staticmethod
    def of(accelerator: Accelerator) -> Processes:
        return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shares(self, n: int) -> list[range]:
        """The block of `n` items of each process; sizes differ by at most one."""
        return [range(n * rank // self.count, n * (rank + 1) // self.count) for rank in range(self.count)]

    def share(self, n: int) -> range:
        """This process's block."""
        return self.shares(n)[self.rank]

    def deal(self, n: int) -> Tensor:
        """This process's rows of `n`, [ceil(n / count)] on every process; -1 pads: a row to run with weight zero."""
        rows = torch.arange(-(-n // self.count)) * self.count + self.rank
        return torch.where(rows < n, rows, -1)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, *] of all processes, in the order of their ranks; n may differ."""
        if self.count == 1:
            return rows
        self.level()
        own = rows.to(self.device, torch.uint8 if rows.dtype == torch.bool else rows.dtype)
        sizes = gather(torch.tensor([len(rows)], device=self.device)).tolist()
        padded = own.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = own
        parts = gather(padded).split(max(max(sizes), 1))
        gathered = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=False)])
        return gathered.to(rows.device, rows.dtype)

    def total(self, value: float) -> float:
        """The sum over processes."""
        return float(self.gather(torch.tensor([value], dtype=torch.float64)).sum())

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Adds up the gradients, in one message per dtype; a parameter that no process reached keeps None."""
        if self.count == 1:
            return
        all_parameters = list(parameters)
        reached = self.gather(torch.tensor([[p.grad is not None for p in all_parameters]])).any(0)
        by_dtype: dict[torch.dtype, list[Parameter]] = {}
        for parameter, used in zip(all_parameters, reached.tolist(), strict=True):
            if used:
                by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for members in by_dtype.values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = reduce(torch.cat([grad.flatten() for grad in grads]), reduction="sum")
            for parameter, grad in zip(members, flat.split([p.numel() for p in members]), strict=True):
                parameter.grad = grad.view_as(parameter).clone()

    def wait(self) -> None:
        """Barrier."""
        self.total(0.0)
