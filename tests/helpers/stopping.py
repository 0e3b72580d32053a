"""Stops a run by a signal in a chosen iteration."""

import os

import pytest

from flowalign.run.run import Run
from flowalign.trainers import Batch


def stopping_in(iteration: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets the signal while that iteration (0 is the first) ends."""
    original = Run.end

    def interrupted(self: Run, current: int, batch: Batch) -> None:
        if current == iteration:
            os.kill(os.getpid(), number)
        original(self, current, batch)

    monkeypatch.setattr(Run, "end", interrupted)
