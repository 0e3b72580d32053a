"""The backward of an update needs no role: activation checkpointing repeats a forward under the weights it ran with."""

from functools import partial
from pathlib import Path

import pytest
import torch

from flowalign.diagnostics import measure
from flowalign.models.roles import Role
from flowalign.trainers import Update
from samplers import Chain
from tests.helpers import policy_gradient
from tests.helpers.policy_gradient import PROMPTS, make


class Regression:
    """One update of the role "fake", whose micro-batch opens and closes the role by itself."""

    def __init__(self, policy, task) -> None:
        self.policy, self.task = policy, task
        generator = torch.Generator().manual_seed(1)
        self.call = (torch.randn(2, 3, 24, 48, generator=generator), torch.tensor([0.7, 0.4]))
        self.rows = policy.encode(PROMPTS)

    def _loss(self) -> torch.Tensor:
        with self.policy.role("fake"):
            return self.policy.velocity(*self.call, self.rows).square().mean()

    def updates(self, batch):
        optimizer = torch.optim.AdamW([p for _, p in self.policy.parameters_of("fake")])
        yield Update(optimizer, 1.0, [partial(self._loss)], dict, role="fake")


@pytest.mark.parametrize("runs", ["diagnostics", "helper"])
def test_another_role_under_checkpointing_has_its_own_gradient(tiny_pipeline: Path, runs: str) -> None:
    policy, trainer = make(tiny_pipeline, Chain())
    policy.add_roles({"fake": Role(update="trained")})
    generator = torch.Generator().manual_seed(2)
    for _, parameter in policy.parameters_of("fake"):  # far from the policy's
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    fake = Regression(policy, trainer.task)

    def found() -> dict[str, torch.Tensor]:
        for _, parameter in policy.parameters_of("fake"):
            parameter.grad = None
        if runs == "diagnostics":
            measure.gradients(policy, fake, None)
        else:
            policy_gradient.run_updates(fake, None)
        return {name: p.grad.clone() for name, p in policy.parameters_of("fake") if p.grad is not None}

    plain = found()
    with policy.checkpointed():
        repeated = found()
    assert plain.keys() == repeated.keys() and len(plain) > 0
    assert all(torch.equal(repeated[name], plain[name]) for name in plain)
