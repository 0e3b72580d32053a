"""RLIR (2509.23958) in a linear world: a policy gradient on recovered actions takes a generator's bias away."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Normalized
from flowalign.data import PromptRecord
from flowalign.models import Size
from flowalign.objectives import ClippedRatio
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import AdamWConfig, PolicyGradient, Signal
from rewards import InverseDynamics, RewardBatch, RewardOutput, RewardSpec, score
from samplers import Chain, FlowSDE
from tests.helpers.affine_chain import Affine, AffinePolicy
from tests.helpers.inverse_dynamics import CentroidShift, dots

MOVES, REACH = 6, 4
LAW = Affine(
    FlowSDE(0.7), steps=4, mean=0.6, std=0.25
)  # what is generated misses each action by N(0.6, 0.25²), but for its steps


@dataclass(frozen=True)
class Filmed:
    """InverseDynamics on the film x_{t+1} = x_t + a_t + e_t of a dot, e the latent [MOVES, 1, 1]: reads latents, since a decoder does
    not know the actions."""

    reward: InverseDynamics
    name: str = "actions"
    spec = RewardSpec(("latents",), range=(0, 1))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.latents is not None
        actions = torch.tensor([row["actions"] for row in batch.metadata]) - REACH
        path = (actions + batch.latents.flatten(1).double()).cumsum(1)
        films = dots(64 + torch.cat([torch.zeros_like(path[:, :1]), path], 1))
        return score(self.reward, replace(batch, latents=None, sigma=None, videos=films, fps=4.0))


def accuracy(shifts: Tensor) -> float:
    """P(â = a) = Φ((½ − m)/s) − Φ((−½ − m)/s) of samples N(m, s²)."""
    mean, variance, _ = LAW.moments(shifts)
    ends = [(edge - float(mean)) / math.sqrt(2 * float(variance)) for edge in (0.5, -0.5)]
    return 0.5 * (math.erf(ends[0]) - math.erf(ends[1]))


def test_a_policy_gradient_on_recovered_actions_takes_the_bias_away() -> None:
    """All along, the mean score is the closed form; at the end, nearly that of no bias."""
    policy = AffinePolicy(LAW, MOVES)
    trainer = PolicyGradient(
        Signal(Normalized()), ClippedRatio(1.0), micro_batch=10**6,
        optimizer=AdamWConfig(lr=0.2, weight_decay=0.0, max_grad_norm=1e9, half_life=8),
    )  # fmt: skip
    drawn = torch.randint(-2, 3, (16, MOVES), generator=torch.Generator().manual_seed(0)) + REACH
    prompts = [PromptRecord(number, f"prompt {number}", {"actions": row}) for number, row in enumerate(drawn.tolist())]
    rollout = Rollout(Chain(train_last=True), FlowSDE(0.7), 16, 16, LAW.steps, micro_batch=10**6)
    reward = Filmed(InverseDynamics(CentroidShift(REACH), batch_size=256))
    trainer.prepare(Task(policy, reward, rollout, 0, Size(1, 1), prompts=prompts), None)
    error = 4 * math.sqrt(0.25 / (16 * 16 * MOVES))
    for iteration in range(30):
        batch = trainer.collect(prompts, iteration)
        measured = float(batch.scores.mean())
        assert measured == pytest.approx(accuracy(policy.theta.detach()), abs=error)
        for update in trainer.updates(batch):
            for micro_batch in update.micro_batches:
                micro_batch().backward()
            update.optimizer.step()
            update.optimizer.zero_grad()
            update.after()
    bias, variance, _ = LAW.moments(policy.theta.detach())
    unbiased = math.erf(0.5 / math.sqrt(2 * float(variance)))
    assert accuracy(torch.zeros(LAW.steps)) < 0.4 and unbiased > 0.95
    assert abs(float(bias)) < 0.1 and accuracy(policy.theta.detach()) > unbiased - 0.02
