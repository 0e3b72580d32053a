"""The metrics row of an iteration: what is added up, what is derived, and where it is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flowalign.config import TrainConfig
from flowalign.errors import RunError
from flowalign.run.checkpoints import Progress
from flowalign.run.trackers import Trackers
from flowalign.storage.metrics_log import MetricsLog

SUMMARY = {  # of a row, for the progress bar: metric -> (name, format); one that a trainer does not measure is left out
    "reward/mean": ("reward", ".3f"),
    "cost/rollout_per_image": ("rollout evals/img", ".1f"),
    "cost/update_per_image": ("update evals/img", ".1f"),
    "time/rollout": ("roll s", ".1f"),
    "time/reward": ("reward s", ".1f"),
    "time/update": ("update s", ".1f"),
}
ADDED_UP = ("time/", "cost/", "loss/")  # over the updates of an iteration; of other metrics the last update's stands


@dataclass
class IterationLog:
    """Collects the metrics of one iteration after another.

    write_rows: whether this process writes metrics.jsonl. updates: metrics of this iteration's updates so far. began:
    time.monotonic() of the iteration. prepared: what the trainer's `prepare` cost, until it is in the first row. summary:
    the latest row in a few words, for the progress bar."""

    config: TrainConfig
    metrics: MetricsLog
    trackers: Trackers
    write_rows: bool
    progress: Progress
    updates: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    prepared: dict[str, float] = field(default_factory=dict)
    summary: str = ""

    def begin(self) -> None:
        """An iteration begins."""
        self.began = time.monotonic()

    def add_norm(self, role: str, norm: float) -> None:
        """The gradient norm of an update of the role's weights."""
        self.progress.reached = self.progress.reached or norm > 0
        self.updates["optim/grad_norm" if role == "policy" else f"optim/{role}_grad_norm"] = norm

    def add(self, metrics: Mapping[str, float]) -> None:
        """The metrics of an update."""
        for name, value in metrics.items():
            before = self.updates.get(name, 0.0) if name.startswith(ADDED_UP) else 0.0
            self.updates[name] = before + value

    def close(self, images: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The iteration's row: `metrics` of its batch and those of its updates. Adds it to the totals of the run."""
        row = dict(metrics)
        for name, value in self.updates.items():
            row[name] = row.get(name, 0.0) + value if name.startswith("cost/") else value
        self.updates = {}
        if "cost/trained_per_image" in row:  # in forward equivalents
            passes = 2.0 if self.config.policy.trainable == "lora" else 3.0
            row["cost/update_per_image"] = passes * row.pop("cost/trained_per_image") + row.get(
                "cost/frozen_per_image", 0.0
            )
        row["time/iteration"] = time.monotonic() - self.began
        row["cost/images"] = images
        row |= self.prepared
        self.prepared = {}
        self._add_to_totals(images, row)
        self.summary = ", ".join(f"{name} {row[key]:{form}}" for key, (name, form) in SUMMARY.items() if key in row)
        return row

    def check_first_gradient(self, row: Mapping[str, float]) -> None:
        """RunError if no gradient was above 0 yet although there was something to learn from."""
        equal_scores = row.get("group/zero_std_ratio", 0.0) == 1  # in every group: then there was nothing
        expected = self.config.run.gradient_check and "optim/grad_norm" in row and not equal_scores
        if expected and not self.progress.reached:
            raise RunError(
                "the first gradient is exactly 0: the policy is frozen, the loss does not reach it, or the reward, where it is "
                "differentiated, has none (rounding and thresholds have not); run `flowalign doctor` on this configuration"
            )

    def write(self, iteration: int, row: Mapping[str, float]) -> None:
        """Appends the row to metrics.jsonl and gives it to the trackers. `iteration` 1 is the first."""
        if self.write_rows:
            self.metrics.append(iteration, row)
        self.trackers.row(iteration, row)

    def _add_to_totals(self, images: int, row: Mapping[str, float]) -> None:
        totals = self.progress.totals
        totals["images"] += images
        for phase in ("rollout", "update"):
            totals[phase] += images * row.get(f"cost/{phase}_per_image", 0.0)
        totals["drift"] = max(totals["drift"], row.get("ratio/drift_max", 0.0))
        totals["rollout"] += row.get("cost/prepare_evaluations", 0.0)
        self.progress.training += row["time/iteration"] + row.get("time/prepare", 0.0)
