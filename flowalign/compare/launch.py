"""Starts the runs of a comparison as child processes, some at once, and says how far they are."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flowalign.compare.plan import Planned
from flowalign.compare.record import costs_by_iteration
from flowalign.errors import RunError
from flowalign.storage.files import DamagedFile
from flowalign.storage.metrics_log import read_rows

POLL, TELL = 1.0, 60.0  # seconds between looks at the children, and between lines
NICE = 5


@dataclass
class Child:
    """A run that goes on. log: what it prints, from byte `printed` on; before that stands what earlier ones printed."""

    run: Planned
    process: subprocess.Popen[bytes]
    log: Path
    printed: int
    began: float = field(default_factory=time.monotonic)


@dataclass
class Launcher:
    """Runs at most `workers` children at once, each with one thread. numbers: (runs that are done, of how many) in the whole
    comparison. finished: what is done with a run once it is finished. failures: sentences."""

    workers: int
    numbers: tuple[int, int]
    finished: Callable[[Planned], None]
    failures: list[str] = field(default_factory=list)
    _speeds: list[float] = field(default_factory=list)  # seconds per unit of the budget, of finished runs

    def run(self, runs: Sequence[Planned]) -> None:
        """Returns when all are done or have failed. KeyboardInterrupt once every child has saved and stopped."""
        waiting, children = list(runs), list[Child]()
        with _terminable():
            try:
                told = time.monotonic()
                while waiting or children:
                    while waiting and len(children) < self.workers:
                        children.append(self._start(waiting[0], self._left(waiting)))
                        del waiting[0]
                    time.sleep(POLL)
                    for child in [child for child in children if child.process.poll() is not None]:
                        children.remove(child)
                        self._end(child)
                    if time.monotonic() - told > TELL:
                        told = time.monotonic()
                        for child in children:
                            print(f"  {child.run.folder.name}: {_progress(child)}", flush=True)
            except KeyboardInterrupt as error:
                _stop(children)
                raise KeyboardInterrupt(f"stopped {len(children)} runs; the same command goes on from there") from error
            except BaseException:  # no run goes on without this process
                _stop(children)
                raise

    def _left(self, waiting: Sequence[Planned]) -> str:
        """How long the runs that are waiting will take, by those that are finished; a budget of seconds needs none. Without
        the comparison's later runs, whose budget is not known yet."""
        mean = sum(self._speeds) / len(self._speeds) if self._speeds else 0.0
        seconds = [run.budget.amount * (1.0 if run.budget.unit == "seconds" else mean) for run in waiting]
        if not all(seconds):
            return ""
        told = f", about {duration(seconds[0])}"
        if len(seconds) > 1:
            told += f", with the {len(seconds) - 1} after it {duration(sum(seconds) / self.workers)}"
        return told

    def _start(self, run: Planned, expected: str) -> Child:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = run.folder.with_name(f"{run.folder.name}.log")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        nice = ["nice", "-n", str(NICE)] if shutil.which("nice") else []
        with log.open("ab") as output:
            printed = output.tell()
            process = subprocess.Popen(
                [*nice, *run.command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # a Ctrl-C reaches the children through this process, once
            )  # fmt: skip
        done, total = self.numbers
        self.numbers = (done + 1, total)
        print(f"run {done + 1} of {total}: {run.method} seed {run.seed}{expected}; log: {log}", flush=True)
        return Child(run, process, log, printed)

    def _end(self, child: Child) -> None:
        seconds, run = time.monotonic() - child.began, child.run
        if child.process.returncode == 0:
            try:
                self.finished(run)
            except (DamagedFile, RunError) as error:
                self.failures.append(f"{run.folder.name}: {error}")
                return
            self._speeds.append(seconds / run.budget.amount)
            print(f"  {run.method} seed {run.seed} is done in {duration(seconds)}", flush=True)
            return
        self.failures.append(f"{run.folder.name} ended with code {child.process.returncode}: {_reason(child)}")
        print(f"  {self.failures[-1]}", flush=True)


def _reason(child: Child) -> str:
    """The sentence with which it ended, else the last line. A run that a killed comparison left writes into the same log."""
    text = child.log.read_bytes()[child.printed :].decode(errors="replace")
    sentences = re.findall(r"(?:configuration error|stopped): [^\r\n]*", text)
    return " ".join(sentences[-1:] or text.strip().splitlines()[-1:])


def _progress(child: Child) -> str:
    """Of a run that goes on, by what it has logged."""
    path = child.run.folder / "metrics.jsonl"
    costs = costs_by_iteration(read_rows(path) if path.exists() else [])
    share = min(1.0, costs[-1][child.run.budget.unit] / child.run.budget.amount)
    seconds = costs[-1]["seconds"]
    left = f", {duration(seconds / share - seconds)} left and its last evaluation" if share > 0 else ""
    return f"iteration {len(costs) - 1}, {100 * share:.0f} % of its budget{left}"


def _stop(children: Sequence[Child]) -> None:
    """Asks every child to save and stop, and waits for them."""
    print(f"stopping {len(children)} runs after their iterations", flush=True)
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    for child in children:
        child.process.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
