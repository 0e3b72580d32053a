"""What is measured with the base model before training: how much noise each step bears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flowalign.buckets import prompts_of_iteration
from flowalign.credit import Gain
from flowalign.models.grid import grid
from flowalign.rollouts.collect import collect
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers.base import Setup
from samplers import Chain, Leveled, Plan, Probed


class Calibration(Protocol):
    """Per-step factors of the noise level, measured once in a new run, before its first update."""

    def check(self, setup: Setup) -> None:
        """ValueError where it cannot work; called before a model is loaded."""
        ...

    def forecast(self, rollout: Rollout) -> tuple[int, int]:
        """(states evaluated, images decoded and scored) of all its rollouts."""
        ...

    def factors(self, task: Task) -> tuple[float, ...]:
        """One per step of the grid, the same on every process."""
        ...


def leveled(task: Task, factors: Sequence[float] | None) -> Task:
    """The task whose steps have `factors` times their noise level; None: as it is."""
    if factors is None:
        return task
    return replace(task, rollout=replace(task.rollout, plan=Leveled(task.rollout.plan, tuple(factors))))


@dataclass(frozen=True)
class GainBalance:
    """DenseGRPO's reward-aware noise calibration (2601.20218, Alg. 1): as much noise as leaves gains and losses balanced.

    A sweep rolls out `trajectories` samples, each of a prompt of its own (of a smaller set some twice), and counts at each
    step i the gains ΔR_i above and below 0, n₊ and n₋ (zeros are neither). Where |n₊ − n₋| < threshold the noise ψ_i rises
    by `step`, else it falls by `step`. ψ_i is the diffusion coefficient: here a factor (samplers.Leveled) times the kernel's own g_i = s_i/√h, so it
    starts at the kernel's noise level (Flow-SDE .7; the paper does not say where) and every kernel works. With CPS and DDIM,
    whose noise is not g·√h, `step` is right to first order only.

    threshold, step: the paper's ε₁ = 2 and ε₂ = .01. The rest is our reading, since the paper says neither how many
    trajectories nor how many sweeps. per: the threshold is meant of so many trajectories and grows with them: 2 of 8 are a
    quarter. None takes it as a count, whatever `trajectories` is; signs by chance alone differ by √trajectories, so a
    balanced step then seldom passes and noise falls everywhere. sweeps: ψ_i moves by sweeps·step at most. Ten are .1, 3 % of
    Flow-SDE's 3.5 at the first of SD3's ten steps and 23 % of its .43 at the last trained one: they show the direction, and
    reach no border that is further away. At the border the rule never settles, it swings; the factors are the mean of the
    last `average` sweeps', each kept inside [lowest, highest].
    plan: of these rollouts, with a probe at both ends of every step that is to be calibrated; other steps keep factor 1.
    Reward guidance is left out: gains are then of the noise alone.

    Noise and prompts are keyed by negative iterations, so training draws what it would without a calibration."""

    trajectories: int = 32
    sweeps: int = 10
    threshold: float = 2.0
    per: int | None = 8
    step: float = 0.01
    lowest: float = 0.1
    highest: float = 2.0
    average: int = 2
    plan: Plan = field(default_factory=lambda: Probed(Chain()))

    def __post_init__(self) -> None:
        if self.trajectories < 1 or not 1 <= self.average <= self.sweeps or (self.per is not None and self.per < 1):
            raise ValueError(f"got {self}; expected trajectories and per at least 1, and 1 <= average <= sweeps")
        if not (0 < self.lowest <= 1 <= self.highest and self.step > 0 and self.threshold > 0):
            raise ValueError(f"got {self}; expected 0 < lowest <= 1 <= highest, step > 0 and threshold > 0")

    def check(self, setup: Setup) -> None:
        """ValueError for several channels, for a level the kernel does not have, and for a plan without gains."""
        rollout = setup.rollout
        if len(setup.channels) > 1:
            raise ValueError(
                f"got trainer.calibration with the channels {list(setup.channels)}; expected one, whose gains it counts: sum them "
                "in one reward (rewards.Mix), or set calibration=null"
            )
        sigma, sigma_next = torch.tensor([[0.5, 0.05], [0.25, 0.01]]).double()  # DDIM bears least noise at the end
        plans = (rollout, replace(rollout, plan=self.plan, group_size=1))
        level = max(float(grow(one, 0, 0, [0]).level.max()) for one in plans)  # a factor multiplies the plan's own
        try:
            rollout.kernel.coefficients(sigma, sigma_next, torch.full_like(sigma, self.highest * level))
        except ValueError as error:
            raise ValueError(
                f"got trainer.calibration.highest={self.highest} with rollout.kernel={rollout.kernel} and levels up to {level:g} in the "
                f"plan: {error}. Lower highest"
            ) from error
        if not self.plan.forecast(rollout.num_inference_steps, 1).edges:
            raise ValueError("got a trainer.calibration.plan without a stochastic step; expected some to calibrate")

    def forecast(self, rollout: Rollout) -> tuple[int, int]:
        cost = self.plan.forecast(rollout.num_inference_steps, 1)
        return self.sweeps * self.trajectories * cost.rollout, self.sweeps * self.trajectories * cost.leaves

    def factors(self, task: Task) -> tuple[float, ...]:
        unit = _diffusion(task)
        found = [torch.ones_like(unit)]
        with tqdm(total=self.sweeps, desc="calibration", unit="sweep", disable=not task.processes.is_main) as bar:
            for sweep in range(self.sweeps):
                found.append(self.moved(found[-1], *self._signs(task, found[-1], sweep), unit))
                told = " ".join(f"{factor:.2f}" for factor in found[-1].tolist())
                bar.set_postfix_str(f"noise × {told}", refresh=False)
                bar.update()
        return tuple(torch.stack(found[-self.average :]).mean(0).tolist())

    def moved(self, factors: Tensor, excess: Tensor, count: Tensor, unit: Tensor) -> Tensor:
        """The factors [T] after one sweep. excess: n₊ − n₋, count: trajectories with a gain, unit: g_i; each [T]."""
        threshold = self.threshold if self.per is None else self.threshold * count / self.per
        direction = torch.where(excess.abs() < threshold, 1.0, -1.0)
        moved = (factors + direction * self.step / unit).clamp(self.lowest, self.highest)
        return torch.where(count > 0, moved, factors)

    def _signs(self, task: Task, factors: Tensor, sweep: int) -> tuple[Tensor, Tensor]:
        """n₊ − n₋ and the number of gains at each step [T], in rollouts with these factors."""
        rollout = replace(
            task.rollout, plan=Leveled(self.plan, tuple(factors.tolist())), groups=self.trajectories, group_size=1,
            sources={}, hint_key=None, reward_guidance=None,
        )  # fmt: skip
        prompts = prompts_of_iteration(task.prompts, self.trajectories, task.seed, -1 - sweep)
        batch = collect(replace(task, rollout=rollout, process_rewards=()), prompts, -1 - sweep)
        tree = batch.forest.tree
        gains = Gain().assign(batch.forest, batch.scores.cpu(), batch.valid.cpu(), batch.channels)
        step = tree.index[tree.parent[tree.edges]]
        signs = torch.where(gains.valid, gains.values.sign(), 0.0)[:, 0]
        excess, count = torch.zeros(2, rollout.num_inference_steps, dtype=torch.float64)
        return excess.index_add(0, step, signs), count.index_add(0, step, gains.valid[:, 0].double())


def _diffusion(task: Task) -> Tensor:
    """g_i = s_i/√h [T] of the kernel at its own level, float64; 1 where a step has no noise and nothing to calibrate."""
    rollout = task.rollout
    shape = task.policy.latent_shape(task.size)
    sigmas = grid(task.policy, rollout.schedule, rollout.num_inference_steps, shape).double()
    index = torch.arange(rollout.num_inference_steps)
    std = rollout.kernel.coefficients(sigmas[:-1], sigmas[1:], torch.ones_like(sigmas[1:]), index).std
    return torch.where(std > 0, std / (sigmas[:-1] - sigmas[1:]).sqrt(), 1.0)
