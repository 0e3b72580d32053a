"""What a run leaves: weights, summary and report, of a finished run with its gains, of a stopped one as far as it came."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config import TrainConfig
from flowalign.models import Policy
from flowalign.report.html import write_report
from flowalign.report.summary import summarize, summarize_stopped, write_results
from flowalign.run.checkpoints import Progress
from flowalign.run.evaluations import Evaluations
from flowalign.run.load import WEIGHTS, save_weights
from flowalign.storage.files import write_atomic


@dataclass(frozen=True)
class Results:
    """Writes them into the run folder; one process writes."""

    config: TrainConfig
    folder: Path
    policy: Policy
    evaluations: Evaluations
    progress: Progress
    write: bool

    def finish(self, iteration: int) -> dict[str, Any]:
        """Evaluates the tuned model, after `iteration` iterations, beside the base. Returns the summary; prints the run's last
        line."""
        tuned, base = self.evaluations.evaluate_and_keep(iteration), self.evaluations.base()
        result = summarize(
            self.config, self.policy, base, tuned, iteration, self.progress.totals, self.progress.elapsed
        )
        self._save_weights()
        if self.write:
            print(write_results(self.folder, base, tuned, result), flush=True)
        return result

    def stop(self, iteration: int) -> str:
        """After `iteration` iterations, without an evaluation. Returns the line to print. An earlier summary, of fewer
        iterations, is replaced: it is not of these weights."""
        result = summarize_stopped(self.config, self.policy, iteration, self.progress.totals, self.progress.elapsed)
        left = [self.folder / "report.html", *self._save_weights()]
        if self.write:
            write_atomic(self.folder / "summary.json", json.dumps(result, indent=1).encode())
            write_report(self.folder)
        return (
            f"stopped after iteration {iteration} of {self.config.run.iterations}, without an evaluation of the tuned model; "
            f"as far as it came: {', '.join(map(str, left))}; the same command goes on from there"
        )

    def _save_weights(self) -> list[Path]:
        """lora/, or networks/ of full weights. Collective."""
        trainable = self.config.policy.trainable
        folder = self.folder / WEIGHTS[trainable]
        with self.evaluations.averaged():
            self.evaluations.processes.level()
            save_weights(self.policy, trainable, folder, write=self.write)
        return [folder]
