"""policy.gradient_checkpointing: fewer activations, the same gradient bit for bit, whatever the role of the backward (I10)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowalign.data import as_records
from flowalign.models import LoRA, load_policy
from flowalign.models.load import read_pipeline
from flowalign.models.roles import Role

LORA = LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2"))
PROMPTS = as_records(["KITE", "MOON", "LAMP"])


def policy_of(pipeline: Any, trainable: str, **switches: Any) -> Any:
    """With a trained role "fake", far from the policy."""
    lora = {"lora": LORA} if trainable == "lora" else {"reference_copy": True}
    policy: Any = load_policy(pipeline, trainable=trainable, **lora, **switches)
    policy.add_roles({"fake": Role(update="trained")})
    generator = torch.Generator().manual_seed(2)
    for role in ("policy", "fake"):
        for _, parameter in policy.parameters_of(role):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def loss_of(policy: Any) -> Tensor:
    """Of two roles, each in a context that is left before the backward."""
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(3, 3, 24, 48, generator=generator), torch.tensor([0.9, 0.6, 0.2])
    rows = policy.encode(PROMPTS)
    with policy.role("fake"):
        fake = policy.velocity(x, sigma, rows)
    with policy.role("reference"), torch.no_grad():
        reference = policy.velocity(x, sigma, rows)
    return (policy.velocity(x, sigma, rows) - reference).square().mean() + (0.5 * fake).square().mean()


def gradients(policy: Any, role: str | None = None) -> dict[str, Tensor]:
    loss = loss_of(policy)
    if role is None:
        loss.backward()
    else:
        with policy.role(role):
            loss.backward()
    named = [pair for name in ("policy", "fake") for pair in policy.parameters_of(name)]
    found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    for _, parameter in named:
        parameter.grad = None
    return found


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_gradient_of_two_roles_is_the_plain_one_under_any_role(tiny_pipeline: Path, trainable: str) -> None:
    plain = gradients(policy_of(str(tiny_pipeline), trainable))
    policy = policy_of(str(tiny_pipeline), trainable, gradient_checkpointing=True)
    assert all(network.is_gradient_checkpointing for network in policy.networks())  # copies too
    for role in (None, "reference", "fake"):
        found = gradients(policy, role)
        assert found.keys() == plain.keys() and sum(float(g.norm()) > 0 for g in plain.values()) > 20
        assert all(torch.equal(found[name], plain[name]) for name in plain), role


def test_without_the_role_of_the_forward_the_gradient_is_another(tiny_pipeline: Path) -> None:
    """What diffusers does by itself, and what the test above would see."""
    policy = policy_of(str(tiny_pipeline), "lora")
    plain = gradients(policy)
    policy.modules()["transformer"].enable_gradient_checkpointing()
    found = gradients(policy)
    name = next(name for name in plain if "lora_A.fake" in name)
    assert found.keys() != plain.keys() or float((found[name] - plain[name]).norm()) > 0.1 * float(plain[name].norm())


def test_recomputed_rows_are_no_evaluations(tiny_pipeline: Path) -> None:
    policy, blocks = policy_of(str(tiny_pipeline), "lora", gradient_checkpointing=True), [0]
    first = policy.modules()["transformer"].transformer_blocks[0]
    first.register_forward_pre_hook(lambda *given: blocks.__setitem__(0, blocks[0] + 1))
    gradients(policy)
    assert policy.evaluations == 9 and blocks == [5]  # three passes, two of them again


def test_a_role_read_from_a_pipeline_is_checkpointed(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline), trainable="full", gradient_checkpointing=True)
    policy.add_roles({"teacher": Role(init=str(tiny_pipeline))})
    assert [network.is_gradient_checkpointing for network in policy.networks()] == [True, True]


def test_a_vae_that_cannot_be_checkpointed_keeps_its_activations(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoencoderKL, "_supports_gradient_checkpointing", False)
    policy: Any = load_policy(str(tiny_pipeline), gradient_checkpointing=True)
    assert policy.networks()[0].is_gradient_checkpointing and not policy.model.vae.is_gradient_checkpointing
    with policy.checkpointed():
        policy.decode(torch.zeros(1, 3, 24, 48), grad=True)


def test_a_live_pipeline_that_checkpoints_already_keeps_the_role(tiny_pipeline: Path) -> None:
    pipeline = read_pipeline(str(tiny_pipeline))
    plain = gradients(policy_of(str(tiny_pipeline), "lora"))
    pipeline.transformer.enable_gradient_checkpointing()
    found = gradients(policy_of(pipeline, "lora"))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


# ------------------------------------------------------------------------------------------ memory


@contextmanager
def activations(network: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the bytes that a forward inside leaves for its backward: what autograd saves, and the inputs of the blocks, which
    checkpointing keeps where autograd does not see it. Weights are no activations."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                keep(value)

    hooks = [block.register_forward_pre_hook(inputs, with_kwargs=True) for block in network.transformer_blocks]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())
    for hook in hooks:
        hook.remove()


def test_saved_activations_are_a_fraction() -> None:
    """On Glyphs, of five blocks, for 16 states."""
    sizes = {}
    for checkpointed in (False, True):
        policy: Any = load_policy("glyphs", lora=LORA, gradient_checkpointing=checkpointed)
        x, rows = (
            policy.start(torch.randn(16, *policy.latent_shape(policy.sampling.size))),
            policy.encode(PROMPTS[:1] * 16),
        )
        with activations(policy.modules()["transformer"]) as kept:
            loss = policy.velocity(x, torch.full((16,), 0.5), rows).square().mean()
            sizes[checkpointed] = kept()
        assert loss.requires_grad
    assert sizes[True] < 0.1 * sizes[False]
