"""A LoRA multiplies in the dtype of the network, from fp32 weights: what it costs, what it gives, and whom it leaves alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.data import as_records
from flowalign.models import LoRA, Policy, Size, load_policy
from flowalign.models.load import read_pipeline
from flowalign.models.lora import lora_layers
from flowalign.models.lora_dtype import multiply_in_input_dtype
from flowalign.models.roles import Role
from tests.helpers.multiplications import Multiplications, kept_bytes

LORA = LoRA(rank=4, alpha=6)  # a scaling of 1.5, which is no power of two
SMALL = LoRA(rank=4, alpha=6, targets=("attn.to_q", "ff.net.2"))
CONFIG = LoraConfig(r=3, lora_alpha=2.1, target_modules=["to_k", "ff.net.2"], init_lora_weights="gaussian")


def shake(policy: Policy, role: str = "policy", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in policy.parameters_of(role):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def velocity(policy: Policy, role: str = "policy") -> Tensor:
    shape = policy.latent_shape(Size(24, 48))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    conditions = policy.encode(as_records(['the word "KITE" in red on a white background', ""]))
    with policy.role(role):
        return policy.velocity(x, torch.tensor([0.9, 0.4]), conditions)


def gradient(policy: Policy, role: str = "policy") -> Tensor:
    """Flat, of the mean square of the velocity, in fp32: every tensor of the role has one."""
    velocity(policy, role).square().mean().backward()
    grads = [parameter.grad for _, parameter in policy.parameters_of(role)]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
    flat = torch.cat([grad.flatten() for grad in grads])
    for _, parameter in policy.parameters_of(role):
        parameter.grad = None
    return flat


def as_peft(policy: Policy) -> Policy:
    """The same policy, whose layers run peft's own forward."""
    for network in policy.modules().values():
        for layer in lora_layers(network):
            vars(layer).pop("forward", None)
    return policy


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def other_lora(folder: Path, policy: Policy) -> Path:
    """A LoRA file for further layers than the policy's, of another rank, with an alpha of its own for each."""
    [(component, network)] = policy.modules().items()
    names = [name for name, part in network.named_modules() if isinstance(part, nn.Linear) and "lora" not in name]
    chosen = [name for name in names if name.endswith(("to_k.base_layer", "to_k", "ff.net.2", "net.0.proj"))]
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(chosen):
        part, module = network.get_submodule(name), name.removesuffix(".base_layer")
        tensors[f"{component}.{module}.lora_A.weight"] = 0.1 * torch.randn(2, part.in_features)
        tensors[f"{component}.{module}.lora_B.weight"] = 0.1 * torch.randn(part.out_features, 2)
        tensors[f"{component}.{module}.alpha"] = torch.tensor(1.0 + number)
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_beside_a_bf16_network_nothing_multiplies_in_fp32(
    tiny_pipeline: Path, tiny_sd15_pipeline: Path, tmp_path: Path, family: str
) -> None:
    """The policy's adapter, a role beside it, and one from a file with other layers."""
    pipeline = {"sd3": tiny_pipeline, "sd15": tiny_sd15_pipeline}[family]
    policy = load_policy(str(pipeline), lora=LORA, dtype="bf16")
    shake(policy)
    policy.add_roles({"fake": Role("trained"), "teacher": Role(init=str(other_lora(tmp_path / "lora", policy)))})
    for role in ("policy", "fake"):
        with Multiplications() as found:
            gradient(policy, role)
        assert set(found.dtypes) == {torch.bfloat16}
    with torch.no_grad(), Multiplications() as found:
        velocity(policy, "teacher")
    assert set(found.dtypes) == {torch.bfloat16}
    assert velocity(policy).dtype == torch.float32
    with Multiplications() as found:  # the count sees what peft does by itself
        gradient(as_peft(policy))
    assert found.dtypes[torch.float32] > 0


def test_autograd_keeps_a_fifth_less(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LORA, dtype="bf16")
    with kept_bytes() as ours:
        kept = [velocity(policy)]
    with kept_bytes() as theirs:
        kept += [velocity(as_peft(policy))]
    assert ours[0] < 0.8 * theirs[0]


def test_in_bf16_it_is_as_close_to_fp32_as_peft_is(tiny_pipeline: Path) -> None:
    exact, ours = (load_policy(str(tiny_pipeline), lora=LORA, dtype=dtype) for dtype in ("fp32", "bf16"))
    for policy in (exact, ours):
        shake(policy)
    errors = []
    for change in (lambda policy: policy, as_peft):
        found = change(ours)
        errors.append((relative(velocity(found), velocity(exact)), relative(gradient(found), gradient(exact))))
    assert errors[0] != errors[1]
    assert all(0 < own < 1.5 * theirs < 0.03 for own, theirs in zip(*errors, strict=True))
    assert relative(velocity(exact, "reference"), velocity(exact)) > 5 * errors[0][0]  # the adapters matter


def test_fp32_bits_are_those_of_peft(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LORA)
    shake(policy)
    ours = velocity(policy), gradient(policy)
    theirs = velocity(as_peft(policy)), gradient(policy)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_gradients_of_both_factors_are_differences(tiny_pipeline: Path) -> None:
    """Of one layer with two active adapters, in double precision: the value is linear in each entry, so a difference is its slope."""
    policy = load_policy(str(tiny_pipeline), lora=LORA)
    shake(policy)
    policy.add_roles({"second": Role("trained")})
    shake(policy, "second", seed=1)
    [network] = policy.modules().values()
    layer: Any = network.transformer_blocks[0].attn.to_q.double()  # the adapters, too, and back to fp32
    sides = [side[name].weight for side in (layer.lora_A, layer.lora_B) for name in ("default", "second")]
    for parameter in sides:
        parameter.data = parameter.data.float()
    layer._active_adapter = ["default", "second"]
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    probe = torch.randn(5, layer.out_features, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * probe).sum(), sides)
    for parameter, grad in zip(sides, found, strict=True):
        assert grad.dtype == torch.float32
        value, values = parameter[1, 2].item(), []
        for moved in (value + 1, value - 1):
            parameter.data[1, 2] = moved
            values.append((parameter[1, 2].item(), (layer(x) * probe).sum().item()))
        parameter.data[1, 2] = value
        slope = (values[0][1] - values[1][1]) / (values[0][0] - values[1][0])
        assert grad[1, 2].item() == pytest.approx(slope, rel=1e-5)


@pytest.fixture
def live(tiny_pipeline: Path) -> tuple[Any, Policy]:
    """A bf16 pipeline with a LoRA of its user, and the policy that trains another one on it."""
    pipe = read_pipeline(str(tiny_pipeline), dtype="bf16")
    pipe.transformer.add_adapter(CONFIG, adapter_name="style")
    policy = load_policy(pipe, lora=SMALL)
    shake(policy)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in pipe.transformer.named_parameters():
        if ".style." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)  # fp32, as a peft model leaves it
    return pipe, policy


def test_adapters_of_a_live_pipeline_multiply_so_too(live: tuple[Any, Policy]) -> None:
    pipe, policy = live
    with Multiplications() as found:
        assert bool(gradient(policy).any())
    assert set(found.dtypes) == {torch.bfloat16}
    with torch.no_grad():
        both, style = velocity(policy), velocity(policy, "reference")
        pipe.transformer.disable_adapters()
        plain = policy.velocity(both, torch.tensor([0.9, 0.4]), policy.encode(as_records(["a", "b"])))
        assert not torch.equal(both, style) and not torch.equal(style, plain)
    for layer in lora_layers(copy.deepcopy(pipe.transformer)):
        assert vars(layer)["forward"].__self__ is layer  # a copy runs with its own weights


@pytest.mark.filterwarnings("ignore:Already unmerged", "ignore:Already found a `peft_config`")
def test_afterwards_diffusers_scales_fuses_adds_and_deletes_as_ever(live: tuple[Any, Policy]) -> None:
    pipe, network = live[0], live[0].transformer

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 24, "width": 48, "output_type": "latent", "generator": generator}
        return pipe("a", num_inference_steps=1, guidance_scale=1.0, **size).images

    both = image()
    network.fuse_lora()
    assert relative(image(), both) < 0.02
    network.unfuse_lora()
    assert relative(image(), both) < 0.02
    network.set_adapters(["style", "default"], [1.0, 0.5])
    half = image()
    network.set_adapters(["style", "default"], [1.0, 0.0])
    style = image()
    assert 0.2 < relative(half, style) / relative(both, style) < 0.8
    network.add_adapter(CONFIG, adapter_name="late")
    network.set_adapters(["late", "style"])
    assert torch.equal(image(), style)  # its B is 0
    network.delete_adapters(["default", "late"])
    assert torch.equal(image(), style)
    pipe.unload_lora_weights()
    assert not lora_layers(network) and not torch.equal(image(), style)


@pytest.mark.parametrize("special", ["dora", "bias", "merged"])
def test_what_is_no_plain_lora_runs_as_peft_runs_it(special: str) -> None:
    network = nn.Sequential(nn.Linear(6, 6)).to(torch.bfloat16)
    settings = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}, "merged": {}}[special]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings), network)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 + torch.rand(parameter.shape)
    if special == "merged":
        network[0].merge()
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    theirs = network(x)
    multiply_in_input_dtype(network)
    assert torch.equal(network(x), theirs)


def test_under_autocast_the_adapters_follow_it(tiny_pipeline: Path) -> None:
    """An fp32 network in a user's own autocast: inputs are fp32 or bf16, products bf16."""
    policy = load_policy(str(tiny_pipeline), lora=LORA)
    shake(policy)
    exact = velocity(policy)
    with Multiplications() as found, torch.autocast("cpu", torch.bfloat16):
        gradient(policy)
        assert relative(velocity(policy), exact) < 0.015
    assert set(found.dtypes) == {torch.bfloat16}


def test_the_layers_compile_whole(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=SMALL, dtype="bf16")
    shake(policy)
    [network] = policy.modules().values()
    block = network.transformer_blocks[0]
    compiled = torch.compile(block.ff, backend="eager", fullgraph=True)
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(x), block.ff(x))
