"""Ctrl-C and SIGTERM: the first asks to stop after the iteration, the second stops at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from tqdm import tqdm

ONE_REQUEST = 2.0  # seconds: with several processes a Ctrl-C comes from the terminal and again from their launcher


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; everything is saved."""


@dataclass
class StopRequest:
    """Whether, and when, this process was asked to stop.

    announce: whether it tells the user. since: time.monotonic() of the first request; None: there was none."""

    announce: bool = True
    since: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which SIGINT and SIGTERM are requests; after it their former handlers are back."""
        former = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. Requests within ONE_REQUEST seconds of the first are the same request; a later one raises
        KeyboardInterrupt, and the last checkpoint stands."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
            if self.announce:
                tqdm.write("stopping after this iteration, then saving (again to stop at once)")
        elif now - self.since >= ONE_REQUEST:
            raise KeyboardInterrupt
