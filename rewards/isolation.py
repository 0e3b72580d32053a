"""Keeps what a reward changes in the process away from the run: random numbers, defaults of torch, the working directory."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

_outermost = threading.Lock()  # held by the one call that is isolated; calls inside it are part of it
_stream: dict[str, Any] = {}  # the random state of all rewards together, once one has been called


@contextmanager
def isolated(name: str) -> Iterator[None]:
    """A call into the reward `name`. Afterwards the settings of the process are what they were: working directory, handlers of
    SIGINT and SIGTERM, torch's default dtype and device, current GPU, grad mode, threads, precision of matmuls and determinism.

    Rewards draw from a random state of their own, of Python, numpy and torch, which goes on from call to call: neither
    seeding nor drawing in a reward changes the caller's. A process that the reward forked ends here, where it would go on as
    a second run; nothing of it is flushed or cleaned up. Calls inside a call (the parts of a mix) are isolated once, together.
    Not kept: environment variables, what a thread does that outlives its call, and what other threads see during it."""
    process, first = os.getpid(), _outermost.acquire(blocking=False)
    before = _Process.now() if first else None
    if before is not None and _stream:
        _set_random_state(_stream)
    try:
        yield
    finally:
        if os.getpid() != process:
            _end_copy(name)
        if before is not None:
            _stream.update(_random_state())
            before.restore()
            _outermost.release()


def _end_copy(name: str) -> NoReturn:
    text = (
        f"reward {name!r} forked, and its copy came back into the run: the copy ends; let a child end itself by os._exit, "
        "or take rewards.workers.Workers\n"
    )
    os.write(2, text.encode())
    os._exit(1)


@dataclass(frozen=True)
class _Process:
    """What is put back: the values of SETTINGS, in their order, and the random state."""

    settings: list[Any]
    random: dict[str, Any]

    @staticmethod
    def now() -> _Process:
        return _Process([get() for get, _ in SETTINGS], _random_state())

    def restore(self) -> None:
        _set_random_state(self.random)
        for (get, put), value in zip(SETTINGS, self.settings, strict=True):
            if get() != value:
                put(value)


def _folder() -> str | None:
    """None if the working directory has been deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _enter(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _handlers(handlers: list[Any]) -> None:
    for number, handler in zip(STOPS, handlers, strict=True):
        if (
            handler is not None and threading.current_thread() is threading.main_thread()
        ):  # None: of C code, out of reach
            signal.signal(number, handler)


def _gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _set_gpu(number: int | None) -> None:
    if number is not None:
        torch.cuda.set_device(number)


STOPS = (signal.SIGINT, signal.SIGTERM)
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [  # how each is read, how it is put back
    (_folder, _enter),
    (lambda: [signal.getsignal(number) for number in STOPS], _handlers),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _device),
    (_gpu, _set_gpu),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _deterministic,
    ),
]


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
