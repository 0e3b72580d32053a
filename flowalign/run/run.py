"""A run: the context that opens it, and the verbs of the main loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from flowalign.buckets import prompts_of_iteration
from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig
from flowalign.data import PromptRecord
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Stepper
from flowalign.errors import ConfigError, RunError
from flowalign.models.ema import EMA
from flowalign.rollouts.task import Task
from flowalign.run.checkpoints import Checkpoints, Progress
from flowalign.run.evaluations import Evaluations
from flowalign.run.folder import describe, open_folder
from flowalign.run.interrupt import Interrupted, StopRequest
from flowalign.run.iteration_log import IterationLog
from flowalign.run.launch import Launch
from flowalign.run.preflight import Prompts, read_saved, state_forecast
from flowalign.run.results import Results
from flowalign.run.trackers import Trackers
from flowalign.run.trial import try_rewards
from flowalign.run.trial_result import records, table
from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import CheckpointError
from flowalign.storage.files import DamagedFile, write_atomic
from flowalign.storage.finite import first_not_finite
from flowalign.storage.metrics_log import MetricsLog
from flowalign.trainers import Batch, Update
from rewards import close


@dataclass(eq=False)
class Run:
    """A run whose folder is open and whose model is loaded; see `open_run`. Its methods are the loop's verbs.

    steppers: the Stepper of each of the trainer's optimizers; filled by `resume`. losses: of the micro-batches since the last
    step, not read yet. opened: time.monotonic() then. padded: policy.padded as the iteration began."""

    config: TrainConfig
    folder: Path
    launch: Launch
    processes: Processes
    prompt_set: list[PromptRecord]
    task: Task
    ema: EMA | None
    stop: StopRequest
    progress: Progress
    checkpoints: Checkpoints
    evaluations: Evaluations
    log: IterationLog
    trackers: Trackers
    results: Results
    steppers: dict[Optimizer, Stepper] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    opened: float = field(default_factory=time.monotonic)
    padded: int = 0

    def resume(self) -> None:
        """Restores the latest checkpoint, if any, then builds a stepper for each of the trainer's optimizers."""
        if not self.checkpoints.restore(self.launch.optimizer_device):
            self.log.prepared = self._prepare_cost()
        elif self.processes.is_main:
            print(f"resumed {self.folder} after iteration {self.checkpoints.latest}", flush=True)
        self.steppers |= self.launch.steppers(self.config.trainer.optimizers.values(), self.processes)

    def evaluate_base(self) -> None:
        """Evaluates the model before training, once per run."""
        self.evaluations.base()

    def iterations(self) -> Iterator[int]:
        """The iterations still to do, with a progress bar."""
        total, first = self.config.run.iterations, self.checkpoints.latest
        with tqdm(
            total=total, initial=first, desc=self.config.run.name, unit="it", dynamic_ncols=True,
            disable=not self.processes.is_main,
        ) as bar:  # fmt: skip
            for iteration in range(first, total):
                if self._is_last(iteration):
                    return
                self.log.begin()
                self.padded = self.task.policy.padded
                yield iteration
                bar.set_postfix_str(self.log.summary, refresh=False)
                bar.update()
                if self.processes.total(self.stop.since is not None) and not self._is_last(iteration + 1):
                    if self.checkpoints.latest <= iteration:
                        self._save(iteration + 1)
                    raise Interrupted(self.results.stop(iteration + 1))

    def prompts(self, iteration: int) -> list[PromptRecord]:
        """The prompts of an iteration, one per group."""
        return prompts_of_iteration(self.prompt_set, self.config.rollout.groups, self.config.run.seed, iteration)

    def backward(self, loss: Tensor, update: Update) -> None:
        """Adds a micro-batch's gradient to that of its update. The losses are read by `step`."""
        self.losses.append(loss.detach())
        self.steppers[update.optimizer].backward(loss)

    def step(self, update: Update) -> None:
        """Takes the optimizer step, if there is anything to learn from; the average follows it. Roles follow every update of the
        policy, an empty one too: those of `every` n updates change when all of a rollout are done. RunError, before the step,
        for a loss that is not finite."""

        def read(norm: Tensor) -> float:
            *losses, norm = update.read([*self.losses, norm])
            self.losses.clear()
            for loss in losses:
                if not math.isfinite(loss):
                    raise self._not_finite(f"loss {float(loss)}", update.role)
            return float(norm)

        if update.micro_batches:
            norm = self.steppers[update.optimizer].step(update.max_grad_norm, read)
            # a loss may reach weights of other roles too: their next step must not see that
            for optimizer in self.steppers:
                optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(norm):
                raise self._not_finite(f"gradient norm {norm}", update.role)
            self.log.add_norm(update.role, norm)
            if update.role == "policy" and self.ema is not None:
                self.ema.update()
        if update.role == "policy":
            self.progress.updates += 1
            self.task.policy.follow(self.progress.updates)
        self.log.add(update.after())

    def end(self, iteration: int, batch: Batch) -> None:
        """Logs the iteration; saves and evaluates when it is time."""
        step, every = iteration + 1, self.config.evaluation.every
        self._check_weights()
        row = self.log.close(batch.images, batch.metrics)
        if self.config.rollout.fixed_rows:
            padded = self.task.policy.padded - self.padded
            row["cost/padded_per_image"] = self.processes.total(padded) / batch.images
        last = self._is_last(step)
        if every is not None and step % every == 0 and not last:
            tuned = self.evaluations.evaluate_on_the_way(step)
            row |= {f"eval/{name}": float(values[values.isfinite()].mean()) for name, values in tuned.scores.items()}
            self.trackers.images(step, self.evaluations.base(), tuned)
        self.log.check_first_gradient(row)
        self.log.write(step, row)
        if self.processes.is_main and (step == 1 or last):
            picture = batch.picture()
            if picture is not None:
                write_atomic(self.folder / "trees" / f"iteration-{step}.png", picture)
        if step % self.config.run.checkpoint_every == 0 or last:
            self._save(step)

    def finish(self) -> dict[str, Any]:
        """Evaluates the tuned model beside the base; writes LoRA, grid, summary and report."""
        result = self.results.finish(self.checkpoints.latest)
        self.trackers.gains(self.checkpoints.latest, result["rewards"])
        return result

    def _prepare_cost(self) -> dict[str, float]:
        """Metrics of what the trainer's `prepare` cost since the model was loaded, backward passes not counted; none if it did
        not use the network."""
        counts = self.task.counts
        spent = {
            "evaluations": self.task.policy.evaluations, "decodes": counts.decodes, "reward_calls": counts.reward_calls,
        }  # fmt: skip
        total = {f"cost/prepare_{name}": self.processes.total(value) for name, value in spent.items()}
        return total | {"time/prepare": time.monotonic() - self.opened} if any(total.values()) else {}

    def _is_last(self, step: int) -> bool:
        """Whether the run ends after `step` iterations, by their number or by what they cost. Collective
        with run.max_seconds: clocks differ."""
        run = self.config.run
        spent = step >= run.iterations or (step > 0 and self.progress.is_spent(step, run))
        return spent if run.max_seconds is None else self.processes.total(spent) > 0

    def _not_finite(self, what: str, role: str) -> RunError:
        """The error for a loss or a gradient that is not finite. Raises that of the weights, if they have made it so."""
        self._check_weights()
        return RunError(
            f"got {what} of {role} from finite weights and scores; expected a finite number: lower trainer.optimizer.lr, or check "
            "the numbers of the objective, the step weight and the regularizers. The last checkpoint stands"
        )

    def _check_weights(self) -> None:
        """RunError for trained weights that are not finite: the next rollout would blame its images for it."""
        roles = ("policy", *self.config.roles)
        name = first_not_finite(pair for role in roles for pair in self.task.policy.parameters_of(role))
        if name is not None:
            raise RunError(
                f"got the weight {name} with a value that is not finite; expected finite weights, but an update made them so: "
                "lower trainer.optimizer.lr, or check the other settings of trainer.optimizer. The last checkpoint stands"
            )

    def _save(self, step: int) -> None:
        main, optimizers = self.processes.is_main, self.config.trainer.optimizers
        self.processes.level()
        full = {name: self.steppers[optimizer].full_optimizer(keep=main) for name, optimizer in optimizers.items()}
        self.checkpoints.save(step, full, write=main)


@contextmanager
def open_run(config: TrainConfig, plain: dict[str, Any]) -> Iterator[Run]:
    """Opens the folder, checks everything that can be checked, then loads the model. Leaving closes rewards and trackers.

    `plain` is the configuration as data. ConfigError for what cannot work, before a model is loaded."""
    folder = Path(os.path.abspath(Path(config.run.output).expanduser())) / config.run.name
    launch = Launch.of(config, folder)
    with ExitStack() as leaving:
        yield _enter(config, plain, folder, launch, leaving)


def _enter(config: TrainConfig, plain: dict[str, Any], folder: Path, launch: Launch, leaving: ExitStack) -> Run:
    processes, prompts = Processes.of(launch.accelerator), Prompts.of(config)
    digests = prompts.digests()
    try:
        if processes.is_main:
            leaving.enter_context(open_folder(folder, plain))
        processes.wait()
        saved = read_saved(config, folder, digests)
    except (CheckpointError, DamagedFile) as error:
        raise ConfigError(str(error)) from error
    state_forecast(config, launch.accelerator.device, processes, launch.sharding)
    for reward in (*config.rollout_rewards, *config.evaluation.rewards):
        leaving.callback(close, reward)
    trials = try_rewards(config, prompts, launch.accelerator.device, announce=processes.is_main)
    policy = policy_of(config, launch.accelerator.device, launch.network_device)
    trials += try_rewards(config, prompts, launch.accelerator.device, policy, announce=processes.is_main)
    processes = launch.shard(policy, processes)
    ema = None if config.run.ema_decay is None else EMA(policy.trainable_parameters(), decay=config.run.ema_decay)
    task = task_of(config, policy, processes=processes)
    metrics, stop = MetricsLog(folder / "metrics.jsonl"), StopRequest(announce=processes.is_main)
    if processes.is_main:
        print(table(trials), flush=True)
        # in this order: config.yaml says how many rows may lack a checkpoint
        metrics.cut_back(saved.iteration)
        MetricsLog(folder / "evaluations.jsonl").cut_back(saved.iteration)
        checkpoint.tidy(folder, config.run.keep_checkpoints)
        changed = {f"prompts.{k}": pair for k, pair in saved.changed_prompts(digests).items()}
        describe(folder, plain, changed, records(trials))
    trackers = Trackers.of(launch.accelerator, config.run, folder)
    leaving.callback(launch.accelerator.end_training)
    leaving.enter_context(stop.listening())
    progress = Progress()
    evaluations = Evaluations(config, folder, policy, prompts.held_out, ema, processes, saved.base)
    return Run(
        config, folder, launch, processes, prompts.train, task, ema, stop, progress, trackers=trackers,
        checkpoints=Checkpoints(config, folder, policy, ema, progress, digests, saved), evaluations=evaluations,
        log=IterationLog(config, metrics, trackers, processes.is_main, progress),
        results=Results(config, folder, policy, evaluations, progress, processes.is_main),
    )  # fmt: skip
