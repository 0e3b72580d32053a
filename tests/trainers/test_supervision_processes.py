"""A supervised term beside the policy gradient: two processes, one of which sends states that the other trains, do what one does."""

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Normalized
from flowalign.distributed.processes import Processes
from flowalign.objectives import ClippedRatio, Gate, GuidanceDistillation, LayerTuning, Supervision, TeacherTargets
from flowalign.rollouts.guidance import Probing, RewardGuidance
from flowalign.rollouts.task import Rollout
from flowalign.trainers import PolicyGradient, Signal
from samplers import Chain, TreeWindow
from tests.helpers.affine_policy import AffinePolicy, gradient_of, prepared, records, rollout
from tests.helpers.one_iteration import Level
from tests.helpers.thread_processes import on_processes

PROMPTS = records("a", "b", "b")  # the first process rolls out two trees, the second one


def tree_rollout() -> Rollout:
    """Of a tree most states are beside its best path."""
    return rollout(3, 8, 4, plan=TreeWindow(depth=2))


def guided_rollout() -> Rollout:
    return rollout(3, 3, 4, plan=Chain(), reward_guidance=RewardGuidance(Level(), spsa=Probing(), scale=3.0))


KINDS: dict[str, tuple[Supervision, Rollout]] = {
    "best path": (LayerTuning(scale=5.0), tree_rollout()),
    "best leaf": (LayerTuning("best_leaf_fm", scale=5.0), tree_rollout()),
    "guided mean": (GuidanceDistillation(scale=5.0), guided_rollout()),
    "guided marginal": (GuidanceDistillation("marginal", scale=5.0), guided_rollout()),
    "teacher": (TeacherTargets("teacher", 5.0), rollout(3, 3, 4)),
    "gated teacher": (TeacherTargets("teacher", 5.0, gate=Gate(0.5)), rollout(3, 3, 4)),
}


def iteration(
    processes: Processes, settings: Rollout, supervision: dict[str, Supervision], updates: int
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of all processes, and the losses of the last update."""
    policy = AffinePolicy.of(4, policy=0.0, teacher=(0.5, -0.5, 0.2))
    trainer = PolicyGradient(
        Signal(Normalized()), ClippedRatio(0.1), supervision=supervision, micro_batch=2, updates_per_rollout=updates
    )
    prepared(policy, trainer, settings, processes=processes)
    batch = trainer.collect(PROMPTS, 0)
    gradient = torch.cat([each.flatten() for each in gradient_of(trainer, batch)])
    return processes.gather(gradient[None]).sum(0), batch.metrics


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradient_of_one(kind: str, updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    term, settings = KINDS[kind]
    alone, _ = iteration(Processes(), settings, {"term": term}, updates)
    without, _ = iteration(Processes(), settings, {}, updates)
    assert float((alone - without).norm()) > 1e-3 * float(without.norm())
    for gradient, _ in on_processes(2, lambda own: iteration(own, settings, {"term": term}, updates), monkeypatch):
        torch.testing.assert_close(gradient, alone, rtol=1e-5, atol=1e-7)
