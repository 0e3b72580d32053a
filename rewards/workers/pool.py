"""A pool of helper processes for engines that must not run in the training process (OCR; engines with their own threads).

Each worker is a fresh interpreter (spawned, never forked: torch's threads do not survive a fork) that runs `worker.py`
alone. multiprocessing's spawn would first import the caller's main module, hence torch and diffusers, in every worker
and break for mains that cannot be imported again (notebooks, `python -`, unguarded scripts under `accelerate launch`).
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from rewards.workers import worker

Message = tuple[dict[str, Any], np.ndarray]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class WorkerError(RuntimeError):
    """A worker died, or its engine raised; the message says which and carries the worker's traceback."""


class WorkerDied(WorkerError):
    """The process is gone; a new one may answer."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection


@dataclass(eq=False)
class Workers:
    """`count` processes, each with one engine from `engine_file`; started by the first `map`, also by an empty one.

    timeout: the longest wait in seconds for the next answer of any worker, for its start and for its taking a job; may be
    changed between two `map`. After a timeout, a death or an error in an engine, all workers are killed, and the next `map`
    starts new ones. Workers end with `close`, with the last reference to the pool, at exit, and within a second of their
    parent's death (even SIGKILL); a forked copy of the parent leaves them alone. POSIX only.
    python: the interpreter, of this environment or of another one with numpy (Python 3.11 or later). environment: variables
    over those of this process; by default one thread each and no GPU.
    """

    engine_file: Path
    options: dict[str, Any]
    count: int
    timeout: float
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=lambda: dict(ONE_THREAD))
    _running: list[_Worker] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _closing: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1 or self.timeout <= 0:
            raise ValueError(
                f"got a pool with count={self.count}, timeout={self.timeout}; expected count >= 1, timeout > 0"
            )
        weakref.finalize(self, _kill, self._running, os.getpid())  # runs at exit too

    def map(self, jobs: Sequence[Message]) -> list[Message]:
        """The answers to the jobs, in their order; without jobs it only starts the workers and waits for their engines.
        TimeoutError or WorkerError."""
        with self._lock:
            try:
                self._start()
                for each in self._running:
                    _limit(each.connection, self.timeout)
                return self._run(jobs)
            except BaseException as error:  # Ctrl-C too: no worker may stay with a job whose answer nobody awaits
                _kill(self._running, os.getpid())
                if self._closing and isinstance(error, WorkerDied):  # no new one may be started for this job
                    raise WorkerError("the pool was closed before an answer") from error
                raise

    def close(self) -> None:
        """Ends all workers and waits for them; a `map` in another thread ends with a WorkerError. The pool can be used again."""
        self._closing = True
        try:
            while not self._lock.acquire(timeout=0.1):  # another thread waits for their answers
                for each in list(self._running):
                    each.process.kill()
            try:
                _kill(self._running, os.getpid())
            finally:
                self._lock.release()
        finally:
            self._closing = False

    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [each.process.pid for each in self._running]

    def _start(self) -> None:
        if self._running:
            return
        for _ in range(self.count):
            self._running.append(_launch(self))
        for each in self._running:  # they start in parallel; each sends a message when its engine is ready
            if not each.connection.poll(self.timeout):
                raise TimeoutError(f"a worker did not start in {self.timeout:g} s")
            _receive(each)

    def _run(self, jobs: Sequence[Message]) -> list[Message]:
        todo = list(enumerate(jobs))[::-1]
        idle = list(self._running)
        busy: dict[Any, tuple[int, _Worker]] = {}  # by connection
        answers: dict[int, Message] = {}
        while todo or busy:
            while todo and idle:
                number, job = todo.pop()
                each = idle.pop()
                _send(each, job)
                busy[each.connection] = (number, each)
            ready = wait(list(busy), self.timeout)
            if not ready:
                raise TimeoutError(f"{len(busy)} of {len(self._running)} workers gave no answer in {self.timeout:g} s")
            for connection in ready:
                number, each = busy.pop(connection)
                answers[number] = _receive(each)
                idle.append(each)
        return [answers[number] for number in range(len(jobs))]


def _limit(connection: Connection, timeout: float) -> None:
    """Lets writes and reads fail after `timeout` seconds: a stopped worker must not block us."""
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, limit)


def _launch(pool: Workers) -> _Worker:
    ours, theirs = socket.socketpair()
    script = [pool.python, "-P", worker.__file__]
    arguments = [str(theirs.fileno()), str(os.getpid()), str(pool.engine_file), json.dumps(pool.options)]
    process = subprocess.Popen(
        script + arguments,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, **pool.environment},
    )
    theirs.close()
    return _Worker(process, Connection(ours.detach()))


def _send(each: _Worker, job: Message) -> None:
    try:
        worker.send(each.connection, *job)
    except BlockingIOError as error:
        raise TimeoutError(f"worker {each.process.pid} takes no job: it is stopped") from error
    except ConnectionError as error:
        raise WorkerDied(_death(each)) from error


def _receive(each: _Worker) -> Message:
    try:
        header, array = worker.receive(each.connection)
    except BlockingIOError as error:
        raise TimeoutError(f"worker {each.process.pid} stopped in the middle of an answer") from error
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(_death(each)) from error
    if "error" in header:
        raise WorkerError(f"the engine of worker {each.process.pid} failed:\n{header['error']}")
    return header, array


def _death(each: _Worker) -> str:
    each.process.kill()  # it has hung up; if it has not gone yet, it goes now
    code = each.process.wait()
    reason = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"worker {each.process.pid} died ({reason}); its last words are on stderr. Out of memory? Use fewer workers"


def _kill(running: list[_Worker], owner: int) -> None:
    """Kills every worker and waits for it. In a forked copy of the owner it does nothing: the workers are not the copy's."""
    if os.getpid() != owner:
        return
    for each in running:
        each.process.kill()
        each.connection.close()
    for each in running:
        each.process.wait()
    running.clear()
