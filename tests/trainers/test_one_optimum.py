"""Three trainers that share no loss, PRDP, full back-propagation with the KL of the path, and implicit tilt matching, end in one law.

With the noise under which a sample is independent of its start (FlowSDE at √2), the KL-regularized optimum over trajectories is
the tilt p·e^{r/β}/Z of what a flow samples, but for the error of its steps: in an affine chain both move the mean by w·Var(x0)/β
and leave the variance alone.
"""

import math

import pytest
from torch import Tensor

from flowalign.advantage import Exponential
from flowalign.objectives import AdvantageWeighted, KLPenalty, VelocityAnchor
from flowalign.rollouts.task import Rollout
from flowalign.trainers import AdamWConfig, BackPropagation, ForwardProcess, FromRollout, RewardDifference
from flowalign.trainers.base import Trainer
from flowalign.trainers.signal import Signal
from flowalign.truncations import LastSteps
from samplers import Chain, FlowSDE, GridSigma, Plan
from tests.helpers.affine_chain import Affine, AffinePolicy, chain_task

BETA, STEPS = 0.8, 20
MEMORYLESS = FlowSDE(math.sqrt(2), reduce="sum")
LAW = Affine(MEMORYLESS, STEPS)
TILT = LAW.std**2 / BETA  # of the mean, for the reward x


def trained(trainer: Trainer, plan: Plan, samples: int, iterations: int) -> Tensor:
    """θ [T] of a policy that starts at 0."""
    policy = AffinePolicy(LAW)
    task = chain_task(policy, Rollout(plan, MEMORYLESS, 1, samples, STEPS, micro_batch=10**6))
    trainer.prepare(task, None)
    for iteration in range(iterations):
        for update in trainer.updates(trainer.collect(task.prompts, iteration)):
            for micro_batch in update.micro_batches:
                micro_batch().backward()
            update.optimizer.step()
            update.optimizer.zero_grad()
            update.after()
    return policy.theta.detach()


def optimizer(lr: float, half_life: float) -> AdamWConfig:
    return AdamWConfig(lr=lr, weight_decay=0.0, max_grad_norm=1e9, half_life=half_life)


def by_pairs() -> Tensor:
    trainer = RewardDifference(
        BETA, clip_range=1e9, over_steps="sum", updates_per_rollout=150, micro_batch=10**6, optimizer=optimizer(0.2, 25)
    )
    return trained(trainer, Chain(shared_start=True, train_last=True), 64, 1)


def by_the_gradient_of_the_reward() -> Tensor:
    kl = KLPenalty(STEPS * BETA, "exact")  # the mean over the steps of a path
    trainer = BackPropagation(LastSteps(None), regularizers={"kl": kl}, micro_batch=10**6, optimizer=optimizer(0.2, 15))
    return trained(trainer, Chain(train_last=True), 2, 100)


def by_tilted_samples() -> Tensor:
    trainer = ForwardProcess(
        Signal(Exponential(eta=1 / BETA)), AdvantageWeighted(), {"old": VelocityAnchor(1.0, "reference")},
        FromRollout("reference"), GridSigma(1.0), draws=2, micro_batch=10**6, epochs=40,
        optimizer=optimizer(0.3, 8),
    )  # fmt: skip
    return trained(trainer, Chain(train_last=True), 2000, 1)  # an ODE of 20 steps has .84 of the variance


@pytest.mark.parametrize(
    "train", [by_pairs, by_the_gradient_of_the_reward, by_tilted_samples], ids=lambda f: f.__name__
)
def test_three_trainers_meet_at_one_optimum(train) -> None:
    mean, variance, _ = LAW.moments()
    moved, spread, _ = LAW.moments(train())
    assert float(moved - mean) == pytest.approx(TILT, rel=0.03)
    assert spread == variance


def test_the_optimum_over_trajectories_becomes_the_tilt_as_steps_are_added() -> None:
    """With this noise only: under less of it a sample keeps a part of its start, which no policy chooses."""

    def error(level: float, steps: int) -> float:
        law = Affine(FlowSDE(level, reduce="sum"), steps)
        moved = law.moments(law.optimum(1.0, BETA))[0] - law.moments()[0]
        return abs(float(moved) / TILT - 1)

    errors = [error(math.sqrt(2), steps) for steps in (20, 40, 80)]
    assert errors[0] < 0.005 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3
    assert error(0.35, 80) > 0.05
