"""Comparisons without child processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flowalign.compare.plan import Planned
from flowalign.config import load_config
from flowalign.loop import train

trained: list[str] = []  # method and seed of every run so far


@dataclass
class InProcess:
    """In the place of flowalign.compare.launch.Launcher: its runs train in this process, one after another."""

    workers: int
    numbers: tuple[int, int]
    finished: Callable[[Planned], None]
    failures: list[str] = field(default_factory=list)

    def run(self, runs: Sequence[Planned]) -> None:
        for run in runs:
            trained.append(f"{run.method}{run.seed}")
            train(*load_config(run.files, run.settings))
            self.finished(run)
