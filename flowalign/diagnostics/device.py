"""What the device did: how long by its own clock, how much memory it held, how often the host waited for it."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WAITED = "called a synchronizing"  # of torch's warning in its synchronization debug mode

Mark = torch.cuda.Event | float


def mark() -> Mark:
    """Now. On a GPU an event in its queue, so that marking waits for nothing."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(began: Mark, ended: Mark) -> float:
    """Between two marks. On a GPU this waits until it has passed the second."""
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    assert isinstance(began, float) and isinstance(ended, float)
    return ended - began


@contextmanager
def waits() -> Iterator[list[str]]:
    """A context that lists where the host waited for a GPU, "file:line" each; without a GPU it stays empty."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found += [f"{each.filename}:{each.lineno}" for each in caught if WAITED in str(each.message)]


def reset_peak() -> None:
    """Restarts what `peak` measures, where the system can (CUDA; Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak() -> float:
    """MiB: allocated on the device, or the process's resident memory (since `reset_peak`, or since its start)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
