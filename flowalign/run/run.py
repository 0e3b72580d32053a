"""What a run owns: device, folder, progress, metrics, checkpoints, evaluation, and the way back after a stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from flowalign.build import policy_of, task_of
from flowalign.config import TrainConfig
from flowalign.data import PromptRecord, digest, load_prompts, prompts_of_iteration
from flowalign.distributed.fsdp2 import shard
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Stepper, Summed
from flowalign.distributed.zero2 import Zero2
from flowalign.errors import ConfigError
from flowalign.evaluation.evaluate import EvaluationResult, evaluate
from flowalign.evaluation.result_file import append_result, load_result, save_result
from flowalign.models.ema import EMA
from flowalign.report.summary import summarize, write_results
from flowalign.report.tree_plot import plot_tree
from flowalign.rollouts.collect import ScoredRollout
from flowalign.run.checkpoints import pack, restore
from flowalign.run.folder import describe, open_folder
from flowalign.run.launch import check_deepspeed, check_environment, check_launch, check_processes
from flowalign.run.preflight import forecast
from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import CheckpointError, Tensors
from flowalign.storage.files import DamagedFile, write_atomic
from flowalign.storage.metrics_log import MetricsLog
from flowalign.trainers import Update
from rewards import RewardBatch, RewardError, score

ONE_REQUEST = 2.0  # seconds: with several processes a Ctrl-C comes from the terminal and again from their launcher


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; everything is saved."""


class Run:
    """A context: entering loads the model and opens the folder, leaving closes workers and trackers."""

    def __init__(self, config: TrainConfig, plain: dict[str, Any]) -> None:
        self.config, self.plain = config, plain
        self.folder = Path(config.run.output) / config.run.name
        check_environment()
        self.accelerator = Accelerator(
            log_with=list(config.run.trackers) or None, project_dir=str(self.folder / "logs")
        )
        kind = self.accelerator.distributed_type
        self._fsdp = self.accelerator.state.fsdp_plugin if kind == DistributedType.FSDP else None
        check_launch(kind, self.accelerator.mixed_precision, self._fsdp, config.policy)
        self._deepspeed = kind == DistributedType.DEEPSPEED
        if self._deepspeed:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        self.processes = Processes.of(self.accelerator)
        check_processes(self.processes.count, config.rollout)
        self._asked_to_stop: float | None = None  # when
        self._first, self._last_saved, self._steps, self._seconds, self._reached = 0, 0, 0, 0.0, False
        self._totals = {"images": 0, "rollout": 0.0, "update": 0.0, "drift": 0.0}
        self._pending: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------ begin and end

    def __enter__(self) -> Run:
        with ExitStack() as leaving:  # undone if entering fails, else when the run is left
            self._enter(leaving)
            self._leaving = leaving.pop_all()
        return self

    def _enter(self, leaving: ExitStack) -> None:
        self._train = load_prompts(self.config.prompts)
        self._held_out = load_prompts(self.config.evaluation.prompts)[: self.config.evaluation.count]
        try:
            if self.processes.is_main:
                leaving.enter_context(open_folder(self.folder, self.plain))
            self.processes.wait()
            self._read_saved()
        except (CheckpointError, DamagedFile) as error:
            raise ConfigError(str(error)) from error
        self._say(forecast(self.config))
        for reward in (self.config.reward, *self.config.evaluation.rewards):
            leaving.callback(reward.close)
        self._try_rewards()
        self.policy = policy_of(self.config, self.accelerator.device, None if self._fsdp is None else "cpu")
        if self._fsdp is not None:
            self.processes = shard(self.policy, self.processes, self._fsdp.reshard_after_forward)
        decay = self.config.run.ema_decay
        self.ema = EMA(self.policy.trainable_parameters(), decay=decay) if decay is not None else None
        self.task = task_of(self.config, self.policy, processes=self.processes)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl")
        if self.processes.is_main:  # in this order: config.yaml says how many rows may lack a checkpoint
            self.metrics.cut_back(self._first)
            MetricsLog(self.folder / "evaluations.jsonl").cut_back(self._first)
            checkpoint.tidy(self.folder, self.config.run.keep_checkpoints)
            describe(self.folder, self.plain)
        self.accelerator.init_trackers("flowalign", init_kwargs={"wandb": {"name": self.config.run.name}})
        leaving.callback(self.accelerator.end_training)
        for name in (signal.SIGINT, signal.SIGTERM):
            leaving.callback(signal.signal, name, signal.signal(name, self._ask_to_stop))
        self._began = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.close()

    def _read_saved(self) -> None:
        """What an earlier start left, read and checked before the model is loaded."""
        path = checkpoint.latest(self.folder)
        self._first = checkpoint.step_of(path) if path is not None else 0
        self._saved = checkpoint.load(path) if path is not None else None
        evaluated = self.folder / "evaluation" / "base.safetensors"
        if self._first and not evaluated.exists():
            raise ConfigError(
                f"{evaluated} is missing, though the run is at iteration {self._first}: restore it, or choose another run.name"
            )
        self._base = load_result(evaluated) if evaluated.exists() else None
        self._prompts = {"train": digest(self._train), "held_out": digest(self._held_out)}
        if self._saved is None and self._base is not None and self._base.digest != self._prompts["held_out"]:
            self._base = None  # nothing is trained yet, and the prompts have changed: evaluated anew
        if self._saved is not None and self._saved[1].get("prompts") != self._prompts:
            raise ConfigError(
                f"{self.config.prompts} or {self.config.evaluation.prompts} changed since {self.folder} was begun: "
                "restore them, or choose another run.name"
            )

    def _try_rewards(self) -> None:
        """Each reward scores two black images: what is misspelt or misshapen shows before the model is loaded."""
        settings = self.config.policy
        asked = [(self.config.reward, self._train), *((r, self._held_out) for r in self.config.evaluation.rewards)]
        for reward, prompts in asked:
            two = (prompts * 2)[:2]
            batch = RewardBatch(
                prompts=[record.prompt for record in two],
                images=torch.zeros(2, 3, settings.height, settings.width),
                metadata=[record.metadata for record in two],
            )
            try:
                score(reward, batch, max_fail_rate=1.0)
            except RewardError as error:
                raise ConfigError(f"tried on two black images, {error}") from error

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_to_stop is not None:
            if now - self._asked_to_stop < ONE_REQUEST:
                return
            raise KeyboardInterrupt  # the second time: at once; the last checkpoint stands
        self._asked_to_stop = now
        if self.processes.is_main:
            tqdm.write("stopping after this iteration, then saving (again to stop at once)")

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)

    # ------------------------------------------------------------------------------------------ the loop's verbs

    def iterations(self) -> Iterator[int]:
        """The iterations still to do, with a progress bar."""
        total = self.config.run.iterations
        with tqdm(
            total=total, initial=self._first, desc=self.config.run.name, unit="it", dynamic_ncols=True,
            disable=not self.processes.is_main,
        ) as self._bar:  # fmt: skip
            for iteration in range(self._first, total):
                self._iteration_began = time.monotonic()
                yield iteration
                self._bar.update()
                if self.processes.total(self._asked_to_stop is not None) and iteration + 1 < total:
                    if self._last_saved <= iteration:
                        self._save(iteration + 1)
                    raise Interrupted(f"stopped after iteration {iteration + 1}; the same command goes on from there")

    def prompts(self, iteration: int) -> list[PromptRecord]:
        return prompts_of_iteration(self._train, self.config.rollout.groups, self.config.run.seed, iteration)

    def backward(self, loss: Tensor, update: Update) -> None:
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss {float(loss)} is not finite; lower the learning rate or look at the reward")
        self._steppers[update.optimizer].backward(loss)

    def step(self, update: Update) -> None:
        """One optimizer step, if there is anything to learn from; the average and the roles follow the policy's."""
        if update.micro_batches:
            norm = self._steppers[update.optimizer].step(update.max_grad_norm)
            self._check_gradient(norm)
            if update.role == "policy":
                self._steps += 1
                self.policy.follow(self._steps)
                if self.ema is not None:
                    self.ema.update()
            self._pending["optim/grad_norm" if update.role == "policy" else f"optim/{update.role}_grad_norm"] = norm
        for name, value in update.after().items():
            before = self._pending.get(name, 0.0) if name.startswith(("time/", "cost/", "loss/")) else 0.0
            self._pending[name] = before + value

    def _check_gradient(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm {norm}; lower optimizer.lr, or look at the reward and the log-probs"
            )
        self._reached = self._reached or norm > 0

    def end(self, iteration: int, batch: ScoredRollout) -> None:
        """Logs the iteration; saves and evaluates when it is time."""
        step, every = iteration + 1, self.config.evaluation.every
        row = {**batch.metrics, **self._pending}
        self._pending = {}
        backward = 2.0 if self.config.policy.trainable == "lora" else 3.0  # forward equivalents of a trained row
        row["cost/update_per_image"] = backward * row.pop("cost/trained_per_image") + row.get(
            "cost/reference_per_image", 0.0
        )
        row["time/iteration"] = time.monotonic() - self._iteration_began
        self._count(batch.images, row)
        self._bar.set_postfix_str(
            f"reward {row['reward/mean']:.3f}, {row['cost/rollout_per_image']:.1f}+{row['cost/update_per_image']:.1f} "
            f"evals/img, roll {row['time/rollout']:.1f} s, reward {row['time/reward']:.1f} s, "
            f"update {row['time/update']:.1f} s"
        )
        if every is not None and step % every == 0 and step < self.config.run.iterations:
            row |= {f"eval/{name}": float(s[s.isfinite()].mean()) for name, s in self._evaluate("tuned").scores.items()}
        equal = row.get("group/zero_std_ratio", 0.0) == 1  # then there was nothing to learn from
        if not (self._reached or equal) and self.config.run.gradient_check and "optim/grad_norm" in row:
            raise RuntimeError(
                "the first gradient is exactly 0: the policy is frozen or the loss does not reach it; run `flowalign doctor` on "
                "this configuration"
            )
        if self.processes.is_main:
            self.metrics.append(step, row)
        self.accelerator.log({k: v for k, v in row.items() if math.isfinite(v)}, step=step)
        if self.processes.is_main and step in (1, self.config.run.iterations):
            picture = plot_tree(batch.forest, batch.scores[:, 0], batch.valid[:, 0])
            write_atomic(self.folder / "trees" / f"iteration-{step}.png", picture)
        if step % self.config.run.checkpoint_every == 0 or step == self.config.run.iterations:
            self._save(step)

    def _count(self, images: int, row: dict[str, float]) -> None:
        total = self._totals
        total["images"] += images
        total["rollout"] += images * row["cost/rollout_per_image"]
        total["update"] += images * row["cost/update_per_image"]
        total["drift"] = max(total["drift"], row.get("ratio/drift_max", 0.0))

    # ------------------------------------------------------------------------------------------ saving and resuming

    def _save(self, step: int) -> None:
        optimizers = {
            name: self._steppers[optimizer].whole(keep=self.processes.is_main)
            for name, optimizer in self.config.trainer.optimizers.items()
        }
        tensors, state = pack(self.policy, list(self.config.policy.roles), optimizers, self.ema)
        state |= {
            "steps": self._steps,
            "reached": self._reached,
            "trainer": self.config.trainer.state(),
            "prompts": self._prompts,
            "totals": dict(self._totals),
            "time/seconds": self._elapsed(),
        }
        if self.processes.is_main:
            checkpoint.save(self.folder, step, tensors, state, keep=self.config.run.keep_checkpoints)
        self._last_saved = step

    @property
    def trainer_state(self) -> dict[str, Any] | None:
        """What the trainer had put into the checkpoint that is taken up; None in a new run."""
        return None if self._saved is None else self._saved[1]["trainer"]

    def resume(self) -> None:
        """Takes up the latest checkpoint, if there is one."""
        if self._saved is not None:
            self._take_up(*self._saved)
        self._steppers: dict[Optimizer, Stepper] = {  # after the weights and the state are what they will be
            optimizer: Zero2(optimizer) if self._deepspeed else Summed(optimizer, self.processes)
            for optimizer in self.config.trainer.optimizers.values()
        }

    def _take_up(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        self._saved, self._last_saved = None, self._first
        roles, optimizers = list(self.config.policy.roles), self.config.trainer.optimizers
        place = torch.device("cpu") if self._deepspeed else None  # DeepSpeed takes each process's part from there
        restore(self.policy, roles, optimizers, self.ema, tensors, state, place)
        self._totals, self._seconds, self._steps = state["totals"], state["time/seconds"], state["steps"]
        self._reached = state.get("reached", True)
        self._say(f"resumed {self.folder} after iteration {self._first}")

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._began

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate_base(self) -> None:
        """The model as it came, once per run: kept in the folder, so a resumed run compares with the same figures."""
        if self._base is None:
            self.base = self._evaluate("base")
            self._log_evaluation(0, "base", self.base)
        else:
            self.base = self._base

    def _log_evaluation(self, step: int, label: str, result: EvaluationResult) -> None:
        """Once per step, however often the run is started; the row first, since the other file says that it is there."""
        if not self.processes.is_main:
            return
        log = self.folder / "evaluations.jsonl"
        MetricsLog(log).cut_back(step - 1)
        append_result(log, step, label, result)
        save_result(self.folder / "evaluation" / f"{label}.safetensors", result)

    def _evaluate(self, label: str) -> EvaluationResult:
        settings, policy = self.config.evaluation, self.config.policy
        total = len(self.processes.share(len(self._held_out) * settings.samples_per_prompt))
        with (
            self._averaged() if label == "tuned" else nullcontext(),
            tqdm(
                total=total, desc=f"evaluate {label}", unit="img", leave=False, disable=not self.processes.is_main
            ) as bar,
        ):
            return evaluate(
                self.policy, self._held_out, settings.rewards, num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale, seed=settings.seed, batch_size=settings.batch_size,
                height=policy.height, width=policy.width, samples_per_prompt=settings.samples_per_prompt,
                progress=bar.update, processes=self.processes,
            )  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """Evaluates the tuned model beside the base; writes LoRA, grid, summary and report."""
        tuned = self._evaluate("tuned")
        self._log_evaluation(self.config.run.iterations, "tuned", tuned)
        result = summarize(self.config, self.policy, self.base, tuned, self._totals, self._elapsed())
        if self.processes.is_main:
            if self.config.policy.trainable == "lora":
                with self._averaged():
                    self.policy.save_lora(self.folder / "lora")
            print(write_results(self.folder, self.base, tuned, result), flush=True)
        return result

    def _averaged(self) -> AbstractContextManager[None]:
        """Inside, the trained weights are their moving average, if the run keeps one."""
        return nullcontext() if self.ema is None else self.ema.applied()
