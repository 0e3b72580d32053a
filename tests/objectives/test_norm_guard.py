"""NormGuard: the hinge's golden values, its gradient, and the meter that a run logs."""

from pathlib import Path

import pytest
import torch

from flowalign.objectives import KLPenalty, NormGuard, RoleSteps
from flowalign.objectives.norm_guard import norm_ratio
from flowalign.report.panels import health_panels
from samplers import Chain, FlowSDE
from tests.helpers.policy_gradient import PROMPTS, make

F64 = torch.float64


def steps(velocity: torch.Tensor) -> RoleSteps:
    return RoleSteps(FlowSDE()(torch.zeros_like(velocity), velocity, 0.7, 0.55), velocity)


@pytest.mark.parametrize(
    ("factor", "loss", "gradient"), [(1.1, 0.01, [0.024, 0.032]), (0.9, 0.0, [0.0, 0.0]), (1.0, 0.0, [0.0, 0.0])]
)
def test_the_hinge_pulls_straight_back_what_is_longer_than_the_reference(factor, loss, gradient) -> None:
    """v_ref = (3, 4), λ = 1."""
    reference = torch.tensor([[3.0, 4.0]], dtype=F64)
    velocity = (factor * reference).requires_grad_()
    got = NormGuard(1.0).divergence(steps(velocity), steps(reference))
    assert float(got.detach()) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), velocity)[0], torch.tensor([gradient], dtype=F64))


def test_its_gradient_against_finite_differences_and_none_to_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, reference = (torch.randn(3, 2, 4, generator=generator, dtype=F64) for _ in range(2))
    velocity = (1.5 * velocity).requires_grad_()
    assert bool((norm_ratio(velocity, reference) > 1).any())
    assert torch.autograd.gradcheck(lambda v: NormGuard(0.7).divergence(steps(v), steps(reference)), velocity)
    reference.requires_grad_()
    NormGuard(0.7).divergence(steps(velocity), steps(reference)).sum().backward()
    assert reference.grad is None


def updated(pipeline: Path, regularizers: dict):
    """(metrics of an update, its gradients, metrics of its batch)."""
    policy, trainer = make(pipeline, Chain(), regularizers=regularizers)
    batch = trainer.collect(PROMPTS, 0)
    (update,) = trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    found = {name: p.grad.clone() for name, p in policy.trainable_parameters() if p.grad is not None}
    return update.after(), found, batch.metrics


def test_the_meter_needs_no_hinge_and_shares_the_evaluations_of_a_kl(tiny_pipeline: Path) -> None:
    kl, gradient, cost = updated(tiny_pipeline, {"kl": KLPenalty(0.1)})
    assert kl["norm/reference"] > 0 and abs(kl["norm/reference"] - 1) > 1e-6
    both, with_meter, shared = updated(tiny_pipeline, {"kl": KLPenalty(0.1), "norm": NormGuard()})
    assert both["norm/reference"] == kl["norm/reference"] and both["loss/norm"] == 0
    assert shared["cost/frozen_per_image"] == cost["cost/frozen_per_image"] == 3
    assert all(torch.equal(gradient[name], with_meter[name]) for name in gradient)
    alone, _, paid = updated(tiny_pipeline, {"norm": NormGuard()})
    assert alone["norm/reference"] == kl["norm/reference"] and paid["cost/frozen_per_image"] == 3
    nothing, _, free = updated(tiny_pipeline, {"kl": KLPenalty(0.0)})
    assert not any(name.startswith("norm") for name in nothing) and "cost/frozen_per_image" not in free


def test_the_mean_is_that_of_the_steps(tiny_pipeline: Path) -> None:
    found, _, _ = updated(tiny_pipeline, {"norm": NormGuard()})
    of_steps = [found[f"norm_step/reference_{k}"] for k in range(3)]  # each step has as many states
    assert found["norm/reference"] == pytest.approx(sum(of_steps) / 3) and len(set(of_steps)) == 3
    assert "norm_step/reference_3" not in found


def test_the_report_charts_the_mean_and_not_every_step() -> None:
    rows = [{"step": 1, "norm/reference": 1.1, "norm_step/reference_0": 1.0, "norm/teacher": 1.2}]
    keys = [panel.key for panel in health_panels(rows)]
    assert keys.count("norm/reference") == 1 and "norm/teacher" in keys
    assert not any(key.startswith("norm_step") for key in keys)
