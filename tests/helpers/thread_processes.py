"""Several processes of a run as threads of one: cheap, and a collective that one calls alone is an error."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from flowalign.distributed import processes as distributed
from flowalign.distributed.processes import Processes

T = TypeVar("T")


def on_processes(count: int, work: Callable[[Processes], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """What `work` returns on each of `count` processes, which are threads: their messages are exchanged in place of
    torch.distributed's. A process that calls a collective alone breaks the barrier."""
    barrier, own, sent = threading.Barrier(count, timeout=20), threading.local(), dict[int, Any]()

    def exchanged(message: Any, read: Callable[[list[Any]], Tensor]) -> Tensor:
        sent[own.rank] = message
        barrier.wait()
        found = read([sent[rank] for rank in range(count)])
        barrier.wait()
        return found

    def gather(rows: Tensor) -> Tensor:
        return exchanged(rows, torch.cat)

    def all_to_all(into: Tensor, rows: Tensor, sizes_in: list[int], sizes_out: list[int]) -> None:
        parts = exchanged(rows.split(sizes_out), lambda all_parts: torch.cat([parts[own.rank] for parts in all_parts]))
        assert len(parts) == sum(sizes_in)
        into.copy_(parts)

    def all_reduce(rows: Tensor) -> None:
        rows.copy_(exchanged(rows.clone(), lambda all_rows: torch.stack(all_rows).sum(0)))

    def run(rank: int) -> T:
        own.rank = rank
        try:
            return work(Processes(rank, count))
        except BaseException:
            barrier.abort()
            raise

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "all_to_all", all_to_all)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
