"""Several processes of a run as threads of one: cheap, and a collective that one calls alone is an error."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from flowalign.distributed import processes as distributed
from flowalign.distributed.processes import Processes

T = TypeVar("T")


def on_processes(count: int, work: Callable[[Processes], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """What `work` returns on each of `count` processes, which are threads: their messages are concatenated in place of
    accelerate's. A process that calls a collective alone breaks the barrier."""
    barrier, own, sent = threading.Barrier(count, timeout=20), threading.local(), dict[int, Tensor]()

    def gather(rows: Tensor) -> Tensor:
        sent[own.rank] = rows
        barrier.wait()
        everything = torch.cat([sent[rank] for rank in range(count)])
        barrier.wait()
        return everything

    def run(rank: int) -> T:
        own.rank = rank
        try:
            return work(Processes(rank, count))
        except BaseException:
            barrier.abort()
            raise

    monkeypatch.setattr(distributed, "gather", gather)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
