"""The processes of a run: which share of the work each does, and how the shares become one batch again.

The rollout is dealt by group, the update by state. Everything in between (credit, advantages, selection) is computed by
every process on the scores of the whole batch, so all agree without communication. States, and all else of a latent's
size, stay where they were made; those that another process trains are sent to it. Gradients are summed once per optimizer
step. That needs no hooks in the network: processes may run different numbers of forwards and backwards without waiting for
each other. Where the network's weights are sharded they cannot, and `level` synchronizes them (flowalign.distributed.fsdp2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor
from torch.distributed import all_reduce
from torch.distributed import all_to_all_single as all_to_all
from torch.nn import Parameter

from flowalign.distributed.deal import Deal
from samplers import Held

BUCKET = 25 * 2**20  # bytes of small gradients that are summed in one message


def _nothing() -> None:
    """Processes whose networks are not sharded need no synchronization."""


@dataclass(frozen=True)
class Processes:
    """`count` processes, of which this is number `rank`; by default the only one. Every method but `shares`,
    `groups`, `owners` and `deal` is collective: all processes must call it, in the same order. Each begins with `level`."""

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

    def groups(self, n: int) -> range:
        """This process's groups of the `n` of an iteration, dealt in turn: so each has its part of any run of them, such as those of
        one update."""
        return range(self.rank, n, self.count)

    def owners(self, groups: Tensor) -> Tensor:
        """[k] the process that has each of `groups` [k]."""
        return groups % self.count

    def deal(self, owner: Tensor) -> Deal:
        """Who works on which of n items that lie on the processes `owner` [n], see Deal."""
        return Deal.of(owner, self.rank, self.count)

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

    def bring(self, rows: Held, owner: Tensor, wanted: Sequence[Tensor]) -> Held:
        """`rows` with, on each process r, those of wanted[r] too: sent by the process owner [N] that has them. All processes know
        what each of them wants; nothing is sent where none lacks any."""
        lacking = [items[owner[items] != rank] for rank, items in enumerate(wanted)]
        if not any(len(items) for items in lacking):
            return rows
        self.level()
        sent = [items[owner[items] == self.rank] for items in lacking]
        come = [lacking[self.rank][owner[lacking[self.rank]] == rank] for rank in range(self.count)]
        outgoing = rows.at(torch.cat(sent)).to(self.device)
        arriving = outgoing.new_empty((len(lacking[self.rank]), *outgoing.shape[1:]))
        all_to_all(arriving, outgoing, [len(items) for items in come], [len(items) for items in sent])
        row = rows.row.index_copy(0, torch.cat(come), len(rows.values) + torch.arange(len(arriving)))
        return Held(row, torch.cat([rows.values, arriving.to(rows.values.device)]))

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Adds up the gradients, in place; a parameter that no process reached keeps None. Small ones travel together."""
        if self.count == 1:
            return
        all_parameters = list(parameters)
        reached = self.gather(torch.tensor([[p.grad is not None for p in all_parameters]])).any(0)
        grads = []
        for parameter, used in zip(all_parameters, reached.tolist(), strict=True):
            if used:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = grad.contiguous()
                grads.append(parameter.grad)
        for bucket in _buckets(grads):
            if len(bucket) == 1:
                all_reduce(bucket[0])
                continue
            flat = torch.cat([grad.flatten() for grad in bucket])
            all_reduce(flat)
            for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(total.view_as(grad))

    def wait(self) -> None:
        """Barrier."""
        self.total(0.0)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs of one dtype and of no more than BUCKET bytes, or one tensor."""
    bucket, size = list[Tensor](), 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
