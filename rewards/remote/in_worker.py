"""A reward in a process of its own, with an environment of its own if named."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, RewardSpec, channels_of
from rewards.parts import in_chunks, spec_elsewhere
from rewards.remote import wire
from rewards.remote.description import describe
from rewards.workers import Message, WorkerDied, WorkerError, Workers

ENGINE = Path(__file__).with_name("engine.py")


@dataclass(eq=False)
class InWorker:
    """`reward` in another process: the same name, scores, components and messages, bit for bit; without gradients.

    For a reward that needs other versions than the run, crashes, leaks, or has threads of its own. `reward` keeps its
    arguments under their names, as a dataclass does; the worker gets its class path and arguments as JSON and builds it
    anew. Here it is only described: it imports what conflicts in `load`.

    python: the interpreter of another environment; None is this one's. It needs Python 3.11, torch, numpy and what the
    reward imports; the package `rewards` is taken from here. timeout: seconds for an answer on `batch_size` samples (None:
    all of a batch at once). start_timeout: seconds for the start, models included. restarts: how often a batch is asked again
    in a new process after one died; after a late answer it is not, since it would be late again. environment: variables
    of the worker over those of this process, such as {CUDA_VISIBLE_DEVICES: "1"}. max_memory: GB in which the worker may
    stay between two batches; above, the next one gets a new process (Linux only).

    A batch that the worker does not answer is a RewardError, and the next batch starts a new worker. Not kept: random
    numbers; the reward draws from the worker's own.
    """

    reward: Reward
    python: str | None = None
    timeout: float = 300.0
    start_timeout: float = 600.0
    restarts: int = 1
    batch_size: int | None = None
    max_memory: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    _pool: Workers = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("timeout", self.timeout), ("start_timeout", self.start_timeout)):
            if not value > 0:
                raise ValueError(f"got {name}={value}; expected seconds > 0")
        if self.restarts < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"got restarts={self.restarts}, batch_size={self.batch_size}; expected at least 0, and at least 1 or None"
            )
        if self.max_memory is not None and not (self.max_memory > 0 and Path("/proc/self/statm").exists()):
            raise ValueError(f"got max_memory={self.max_memory}; expected GB > 0 on Linux, or None")
        if self.python is not None and shutil.which(self.python) is None:
            raise ValueError(
                f"got python={self.python!r}, no program; expected an interpreter, such as other/.venv/bin/python"
            )
        options = {
            "package": str(Path(__file__).parents[1]),
            "path": list(sys.path) if self.python is None else [str(Path.cwd())],
            "description": describe(self.reward),
        }
        self._pool = Workers(ENGINE, options, 1, self.timeout, self.python or sys.executable, self.environment)

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        """The reward's, not differentiable."""
        return spec_elsewhere(self.reward)

    def load(self) -> None:
        """Starts the worker, which loads the reward. RewardError if it does not start."""
        self._pool.timeout = self.start_timeout
        try:
            self._pool.map([])
        except (WorkerError, TimeoutError, OSError) as error:
            raise RewardError(
                f"the worker of reward {self.name!r} did not start with {self._pool.python}: {error}. It needs Python 3.11, "
                "torch, numpy and what the reward imports; its own messages are on stderr"
            ) from error
        finally:
            self._pool.timeout = self.timeout

    def close(self) -> None:
        self._pool.close()

    def pids(self) -> list[int]:
        """Process id of the worker, if it runs."""
        return self._pool.pids()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return in_chunks(self._ask, batch, self.batch_size, groupwise=self.spec.groupwise)

    def _ask(self, batch: RewardBatch) -> RewardOutput:
        if self._memory() > (self.max_memory or np.inf):
            self.close()
        header, array = self._answer(({}, np.frombuffer(wire.encode_batch(batch), dtype=np.uint8)))
        if "failed" in header:
            raise RewardError(f"in its worker, {header['failed']}")
        output = wire.decode_output(array.tobytes(), len(batch), wire.UNLIMITED)
        if output.channels != channels_of(self.reward):
            raise RewardError(f"got channels {output.channels} from its worker; expected {channels_of(self.reward)}")
        return output

    def _answer(self, job: Message) -> Message:
        for left in range(self.restarts, -1, -1):
            self.load()
            try:
                return self._pool.map([job])[0]
            except WorkerDied as error:
                if not left:
                    raise RewardError(f"{error}; asked {self.restarts + 1} times") from error
            except (WorkerError, TimeoutError) as error:
                raise RewardError(str(error)) from error
        raise AssertionError("unreachable: the last turn returns or raises")

    def _memory(self) -> float:
        """GB in which the worker is now."""
        if self.max_memory is None or not self.pids():
            return 0.0
        try:
            pages = int(Path(f"/proc/{self.pids()[0]}/statm").read_text().split()[1])
        except (OSError, IndexError):  # it has gone; the next job finds out
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
