"""A run's evaluations on held-out prompts: the base model once per run, the tuned model with its average."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flowalign.config import TrainConfig
from flowalign.data import PromptRecord
from flowalign.distributed.processes import Processes
from flowalign.evaluation.evaluate import EvaluationResult, evaluate
from flowalign.evaluation.result_file import append_result, save_result
from flowalign.models import Policy
from flowalign.models.ema import EMA
from flowalign.run.held_out_rewards import held_out_rewards
from flowalign.storage.metrics_log import MetricsLog


@dataclass
class Evaluations:
    """Evaluates as `config.evaluation` says (how it generates, the policy knows: `Policy.sampling`) and keeps the results in the run folder.

    known_base: the base model's result, once it is there; read from the folder when a run resumes."""

    config: TrainConfig
    folder: Path
    policy: Policy
    held_out: list[PromptRecord]
    ema: EMA | None
    processes: Processes
    known_base: EvaluationResult | None

    def base(self) -> EvaluationResult:
        """The untrained model, evaluated once per run: a resumed run compares with the same figures."""
        if self.known_base is None:
            self.known_base = self._evaluate("base")
            self._log(0, "base", self.known_base)
        return self.known_base

    def evaluate_and_keep(self, iteration: int) -> EvaluationResult:
        """The trained model after `iteration` iterations; kept in the folder."""
        result = self.evaluate_tuned()
        self._log(iteration, "tuned", result)
        return result

    def evaluate_on_the_way(self, iteration: int) -> EvaluationResult:
        """The trained model after `iteration` iterations; its scores are kept, its images are not."""
        result = self.evaluate_tuned()
        self._append(iteration, "on the way", result)
        return result

    def evaluate_tuned(self) -> EvaluationResult:
        """The trained model; under its moving average, if the run keeps one."""
        with self.averaged():
            return self._evaluate("tuned")

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the trained weights are their moving average, if the run keeps one."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _evaluate(self, label: str) -> EvaluationResult:
        settings = self.config.evaluation
        total = len(self.processes.share(len(self.held_out) * settings.samples_per_prompt))
        with tqdm(
            total=total, desc=f"evaluate {label}", unit="img", leave=False, disable=not self.processes.is_main
        ) as bar:
            return evaluate(
                self.policy, self.held_out, held_out_rewards(self.config), seed=settings.seed, batch_size=settings.batch_size,
                samples_per_prompt=settings.samples_per_prompt, progress=bar.update, processes=self.processes,
            )  # fmt: skip

    def _log(self, iteration: int, label: str, result: EvaluationResult) -> None:
        """Writes the row before the file: if base.safetensors exists, so does its row."""
        self._append(iteration, label, result)
        if self.processes.is_main:
            save_result(self.folder / "evaluation" / f"{label}.safetensors", result)

    def _append(self, iteration: int, label: str, result: EvaluationResult) -> None:
        """A row of evaluations.jsonl; one of an earlier launch is cut."""
        if not self.processes.is_main:
            return
        log = self.folder / "evaluations.jsonl"
        MetricsLog(log).cut_back(iteration - 1)
        append_result(log, iteration, label, result)
