"""What a rollout counts and how it calls the network: samples apart from probes, the unconditional half detached."""

from pathlib import Path

import pytest
import torch

from flowalign.advantage import Normalized
from flowalign.credit import Gain
from flowalign.objectives import KLPenalty
from flowalign.rollouts.rolling import leaves_per_group
from flowalign.rollouts.task import Rollout
from samplers import Branch, Chain, Deterministic, FlowSDE, Probed, Selected, SplitTree, Window
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Chain(), (4, 0)),
        (Probed(Chain()), (4, 4 * 3)),  # the states 0, 1, 2; state 3 goes on deterministically itself
        (Selected(Chain(), {2: 2}), (2, 0)),
        (
            Selected(Probed(Chain()), {2: 2}),
            (2, 2 * 3 + 2 * 2),
        ),  # a dropped chain leaves the probes of its states 0 and 1
        (Probed(Chain(), duplicate=True), (4, 4 * 4)),
        (SplitTree((0, 1), 2), (4, 0)),
        (Branch(branches=2), (2 * 2 * 3, 0)),  # two seeds branch at three steps; the trunk is not decoded
        (Window(size=1, low=1, high=2), (4, 0)),
        (Deterministic(), (4, 0)),
    ],
    ids=[
        "chain",
        "probed",
        "selected",
        "selected and probed",
        "probed twice",
        "split",
        "branch",
        "window",
        "deterministic",
    ],
)
def test_samples_and_probes_of_a_group(plan, expected) -> None:
    settings = Rollout(plan, FlowSDE(), groups=2, group_size=4, num_inference_steps=4)
    assert leaves_per_group(settings) == expected


def test_a_probe_is_not_an_image(tiny_pipeline: Path) -> None:
    """Per prompt three chains of four steps and three probes of each; velocities shared: 4 + 3 + 2 + 1 rows a sample."""
    policy, trainer = make(
        tiny_pipeline,
        Probed(Chain()),
        regularizers={"kl": KLPenalty(0.1)},
        credit=Gain(),
        advantage=Normalized(within="prompt_step"),
    )
    batch = trainer.collect(PROMPTS, 0)
    rolled = policy.evaluations
    assert rolled == 2 * 3 * (4 + 3 + 2 + 1) and len(batch.scores) == 2 * 3 * 4
    assert batch.images == 2 * 3
    assert batch.metrics["cost/rollout_per_image"] == rolled / 6 == 10
    assert batch.metrics["cost/probes_per_image"] == 3
    (update,) = trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch()
    assert batch.metrics["cost/frozen_per_image"] == 3  # the reference and the trained pass: three states a sample
    assert update.after()["cost/trained_per_image"] == 6 - 3  # counted since the update began


def test_without_probes_none_are_counted(tiny_pipeline: Path) -> None:
    _, trainer = make(tiny_pipeline, Chain())
    batch = trainer.collect(PROMPTS, 0)
    assert batch.images == 6 and "cost/probes_per_image" not in batch.metrics


def test_the_detached_gradient_is_that_of_the_conditional_half(tiny_pipeline: Path) -> None:
    policy, _ = make(tiny_pipeline, Chain())
    conditions = policy.encode(PROMPTS[:1], negative=True)
    x, sigma, weight = torch.randn(1, 3, 24, 48), torch.tensor([0.7]), torch.randn(1, 3, 24, 48)
    detached = policy.velocity(x, sigma, conditions, guidance_scale=4.5, detach_uncond=True)
    (detached * weight).sum().backward()
    found = gradients(policy)
    (4.5 * policy.velocity(x, sigma, conditions) * weight).sum().backward()
    expected = gradients(policy)
    full = policy.velocity(x, sigma, conditions, guidance_scale=4.5)
    torch.testing.assert_close(detached, full, rtol=1e-4, atol=1e-5)
    (full * weight).sum().backward()
    both = gradients(policy)
    assert found.keys() == expected.keys() and len(found) > 0
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    assert any(not torch.allclose(found[name], both[name], rtol=0.05, atol=1e-3 * scale) for name in found)


@pytest.mark.parametrize("detach", [False, True])
def test_rollout_reference_and_update_call_the_network_alike(tiny_pipeline: Path, detach: bool, monkeypatch) -> None:
    policy, trainer = make(
        tiny_pipeline, Chain(), guidance=4.5, detach_uncond=detach, regularizers={"kl": KLPenalty(0.1)}
    )
    original, calls = policy.velocity, []

    def recorded(*arguments, **named):
        calls.append(named)
        return original(*arguments, **named)

    monkeypatch.setattr(policy, "velocity", recorded)
    batch = trainer.collect(PROMPTS, 0)
    rolled = len(calls)
    (update,) = trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch()
    assert len(calls) >= rolled + 2 and rolled == 4
    assert calls == [{"guidance_scale": 4.5, "detach_uncond": detach}] * len(calls)
    assert update.after()["ratio/drift_max"] < 1e-6


def test_the_configured_gradient_is_that_of_the_released_code(tiny_pipeline: Path) -> None:
    found = []
    for detach in (True, False):
        policy, trainer = make(tiny_pipeline, Chain(), guidance=4.5, detach_uncond=detach)
        batch = trainer.collect(PROMPTS, 0)
        run_updates(trainer, batch)
        found.append(torch.cat([g.flatten() for g in gradients(policy).values()]))
    detached, full = found
    assert float(torch.cosine_similarity(detached, full, dim=0)) < 0.99
