"""Roles on one base: what each answers, when it follows the policy, and that looking at one never changes another."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from flowalign.data import as_records
from flowalign.models import LoRA, Policy, load_policy
from flowalign.models.checks import check_role_pipelines
from flowalign.models.roles import Role, check_roles
from tests.helpers.tiny import tiny_sd3

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


def test_schedules_of_the_average_are_the_papers() -> None:
    nft = Role("ema", rate=0.0075, start=75, decay=0.999)  # DiffusionNFT, its second schedule
    assert [nft.decay_at(n) for n in (1, 74, 75, 76, 175, 208, 209, 1000)] == pytest.approx(
        [0, 0, 0, 0.0075, 0.75, 0.9975, 0.999, 0.999]
    )
    crd = Role("ema", rate=0.005, offset=0.25, decay=0.999)
    assert [crd.decay_at(n) for n in (0, 1, 100, 500)] == pytest.approx([0.25, 0.255, 0.75, 0.999])
    tdm = Role("ema", rate=0.001, offset=0.001, decay=0.3)
    assert [tdm.decay_at(n) for n in (1, 10, 298, 299, 1000)] == pytest.approx([0.002, 0.011, 0.299, 0.3, 0.3])
    assert Role("ema", decay=0.5, start=3).decay_at(2) == 0 and Role("ema", decay=0.5, start=3).decay_at(3) == 0.5


def test_a_role_follows_the_role_that_it_names_after_that_one(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LORA)
    policy.add_roles({  # written against the order in which they must follow
        "slow": Role("ema", decay=0.5, of="fast"), "fast": Role("ema", decay=0.25, of="old"), "old": Role("copy"),
    })  # fmt: skip
    weights = {role: [p.clone() for _, p in policy.parameters_of(role)] for role in ("old", "fast", "slow")}
    for step in (1, 2):
        shake(policy, 0.1, seed=step)
        policy.follow(step)
        weights["old"] = [p.detach().clone() for _, p in policy.trainable_parameters()]
        for role, of, keep in (("fast", "old", 0.25), ("slow", "fast", 0.5)):
            pairs = zip(weights[role], weights[of], strict=True)
            weights[role] = [keep * own + (1 - keep) * source for own, source in pairs]
    for role, expected in weights.items():
        for (_, parameter), value in zip(policy.parameters_of(role), expected, strict=True):
            torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_role_of_full_weights_starts_from_another_pipeline(tiny_pipeline: Path, tmp_path: Path) -> None:
    other = tiny_sd3(tmp_path / "other", seed=5)
    expected = load_policy(str(other), trainable="full").trainable_parameters()
    role = Role("trained", init=str(other))
    policy = load_policy(str(tiny_pipeline), trainable="full")
    before = velocity(policy)
    policy.add_roles({"fake": role, "real": Role(init=str(other)), "slow": Role("ema", init=str(other), of="fake")})
    for name in ("fake", "real", "slow"):
        for (_, value), (_, wanted) in zip(policy.parameters_of(name), expected, strict=True):
            assert torch.equal(value, wanted)
    assert torch.equal(velocity(policy), before) and not torch.equal(velocity(policy, "real"), before)
    assert all(p.requires_grad for _, p in policy.parameters_of("fake"))
    assert not any(p.requires_grad for name in ("real", "slow") for _, p in policy.parameters_of(name))
    check_role_pipelines(str(tiny_pipeline), {"fake": role})
    (tmp_path / "other" / "transformer" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the role fake.*config.json"):
        check_role_pipelines(str(tiny_pipeline), {"fake": role})
    with pytest.raises(ValueError, match=r"the role fake.*transformer differs from the policy's in"):
        check_role_pipelines(str(tiny_pipeline), {"fake": Role(init="glyphs")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_roles({"a": Role("copy", of="b")}), "expected 'policy' or one of a"),
        (lambda: check_roles({"a": Role("copy", of="b"), "b": Role("ema", of="a")}), "a, b, which follow each other"),
        (lambda: check_roles({"a": Role("copy", of="a")}), "a, which follow each other in a circle"),
        (lambda: Role("frozen", of="a"), "which follows nothing"),
        (lambda: Role("ema", offset=0.5), "without a rate"),
        (lambda: Role("ema", rate=1, offset=1.0), "0 <= offset < 1"),
        (lambda: Role("ema", start=-1), "start >= 0"),
    ],
)
def test_roles_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_layers_of_a_role_are_found_once(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A walk over the one network; none with full weights, where a role is a network."""
    walks, modules = [], torch.nn.Module.modules
    monkeypatch.setattr(torch.nn.Module, "modules", lambda self: walks.append(type(self).__name__) or modules(self))
    for role in ("policy", "reference", *ROLES):
        with policy.role(role):
            pass
    assert walks == (["SD3Transformer2DModel"] if request.node.callspec.params["policy"] == "lora" else [])


def test_the_roles_in_the_documentation_are_roles() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", page, re.S) if "roles:" in each]
    roles = {name: Role(**settings) for name, settings in yaml.safe_load(block)["policy"]["roles"].items()}
    check_roles(roles)
    assert roles["sampling"].decay_at(76) == 0.0075 and roles["teacher"].folder == "runs/first/lora"
