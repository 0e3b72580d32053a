"""Roles on one base: what each answers, when it follows the policy, and that looking at one never changes another."""

from pathlib import Path

import pytest
import torch

from flowalign.data import as_records
from flowalign.models import LoRA, Policy, load_policy
from flowalign.models.roles import Role

LORA = LoRA(rank=4, alpha=8, targets=("attn.to_q", "ff.net.2"))
ROLES = {
    "old": Role("copy", every=2),
    "fast_ema": Role("ema", decay=0.9, rate=0.25),
    "teacher": Role("frozen"),
    "fake": Role("trained"),
}


@pytest.fixture(params=["lora", "full"])
def policy(request: pytest.FixtureRequest, tiny_pipeline: Path) -> Policy:
    found = load_policy(str(tiny_pipeline), lora=LORA, trainable=request.param, reference_copy=True)
    shake(found, 0.05, seed=0)
    found.add_roles(ROLES)
    return found


def shake(policy: Policy, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def velocity(policy: Policy, role: str = "policy") -> torch.Tensor:
    x = torch.randn(2, 3, 24, 48, generator=torch.Generator().manual_seed(1))
    conditions = policy.encode(as_records(['the word "KITE" in red on a white background', ""]))
    with policy.role(role):
        return policy.velocity(x, torch.tensor([0.9, 0.4]), conditions)


@torch.no_grad()
def test_roles_begin_as_the_policy_and_follow_on_their_own_schedule(policy: Policy) -> None:
    begin = velocity(policy)
    assert all(torch.equal(velocity(policy, role), begin) for role in ROLES)
    assert not torch.equal(velocity(policy, "reference"), begin)
    expected = {name: p.clone() for name, p in policy.parameters_of("fast_ema")}
    for step, keep in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 0.9), (5, 0.9)):
        shake(policy, 0.02, seed=step)
        before = velocity(policy, "old")
        policy.follow(step)
        assert torch.equal(velocity(policy, "old"), velocity(policy) if step % 2 == 0 else before)
        for (_, source), (name, value) in zip(policy.trainable_parameters(), expected.items(), strict=True):
            expected[name] = keep * value + (1 - keep) * source
    for name, parameter in policy.parameters_of("fast_ema"):
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(velocity(policy, "teacher"), begin)
    assert torch.equal(velocity(policy, "fake"), begin)


def test_a_look_at_every_role_changes_neither_gradients_nor_what_requires_them(policy: Policy) -> None:
    def gradients(look: bool) -> list[torch.Tensor]:
        loss = velocity(policy).square().mean()
        if look:
            flags = [p.requires_grad for module in policy.modules().values() for p in module.parameters()]
            with torch.no_grad():
                for role in ("reference", *ROLES):
                    velocity(policy, role)
            assert flags == [p.requires_grad for module in policy.modules().values() for p in module.parameters()]
        loss.backward()
        found = [p.grad for _, p in policy.trainable_parameters()]
        for _, parameter in policy.trainable_parameters():
            parameter.grad = None
        return [grad for grad in found if grad is not None]

    plain, looked = gradients(look=False), gradients(look=True)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))


def test_a_trained_role_has_gradients_of_its_own(policy: Policy) -> None:
    velocity(policy, "fake").square().mean().backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for _, p in policy.parameters_of("fake"))
    assert all(p.grad is None for role in ("policy", "old", "teacher") for _, p in policy.parameters_of(role))


def test_names_of_parameters_differ_between_roles(policy: Policy) -> None:
    names = [name for role in ("policy", *ROLES) for name, _ in policy.parameters_of(role)]
    assert len(set(names)) == len(names)


def test_bad_names(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"'reference' \(the model without training\)"):
        policy.add_roles({"reference": Role()})
    with pytest.raises(ValueError, match="expected one of policy, reference, old"):
        velocity(policy, "older")
    with pytest.raises(ValueError, match="expected 0 <= decay < 1"):
        Role("ema", decay=1.0)
