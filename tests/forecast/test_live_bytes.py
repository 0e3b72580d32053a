"""Bytes at the same time: closed forms of small computations, and the trial figures of public architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel, WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from flowalign.models.families.sd3 import TARGETS
from flowalign.models.live_bytes import LiveBytes, forward_bytes, fused_attention, update_bytes
from flowalign.testing.shapes import FLUX_1, SD3_MEDIUM, WAN_1_3B

GIB = 2**30
BF16 = torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_chain_without_gradient_holds_two_tensors() -> None:
    """x → x·2 → x·3 → …: while a step is made its input is still there, and nothing before it; views and in-place writes are free."""
    x = empty(1000)

    def chain() -> Tensor:
        y = x * 2
        for _ in range(5):
            y = y.view(10, 100).mul(3).reshape(-1)
            y += 1
        return y

    assert forward_bytes(chain) == 2 * 4000


def test_what_is_freed_no_longer_counts() -> None:
    with LiveBytes() as counted:
        first = empty(100) * 2  # the factory's tensor is freed at once
        assert (counted.live, counted.peak) == (400, 800)
        second = first[:10].clone()
        del first
        assert (counted.live, counted.peak) == (second.nbytes, 800)


def test_an_update_holds_what_its_backward_reads() -> None:
    """Linear layers with tanh between: each output of a tanh is stored for its own backward and as the input of the next layer."""
    width, rows, depth = 64, 1000, 4
    layers = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]).to("meta")
    x, row = empty(rows, width), rows * width * 4
    parameters = list(layers.parameters())
    stored = update_bytes(lambda: layers(x), parameters)
    # the four outputs; then the gradient that came, those of the last layer's output and input, and its weights' before it is added
    assert stored == (depth + 3) * row + sum(parameter.nbytes for parameter in parameters[-2:])
    assert update_bytes(lambda: layers(x[: rows // 2]), parameters) < 0.6 * stored
    one_row = update_bytes(lambda: layers(x[:1]), parameters)
    assert one_row < 2 * parameters[0].nbytes  # gradients of all layers would be more: the optimizer counts them
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_attention_has_no_matrix_of_scores(dtype: torch.dtype) -> None:
    """4 heads of 16, n keys: twice the keys are twice the bytes, of a matrix they would be four times."""

    def attend(n: int) -> int:
        q, k, v = (empty(1, 4, n, 16, dtype=dtype).requires_grad_() for _ in range(3))
        return update_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), [q, k, v])

    short, long = attend(512), attend(1024)
    assert long == 2 * short < 4 * 1024 * 1024 * dtype.itemsize
    with fused_attention():
        pass
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "flowalign.models.live_bytes"


# ------------------------------------------------------------------------------------------ trial figures


def with_lora(network: ModelMixin, targets: tuple[str, ...], dtype: torch.dtype) -> ModelMixin:
    """In bf16 with adapters of rank 32 as peft computes them: in their own dtype, with copies of their inputs in it."""
    nn.Module.to(network, BF16).requires_grad_(False)
    network.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=list(targets)))
    for parameter in adapters(network):
        parameter.data = parameter.data.to(dtype)
    return network.eval()


def adapters(network: ModelMixin) -> list[Any]:
    return [parameter for name, parameter in network.named_parameters() if ".lora_" in name]


def gib(network: ModelMixin, call: Callable[[], Tensor]) -> tuple[float, float, float]:
    """(weights, an update of one state plain, checkpointed)."""
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    plain = update_bytes(call, adapters(network))
    network.enable_gradient_checkpointing()
    return weights / GIB, plain / GIB, update_bytes(call, adapters(network)) / GIB


def sd35_medium(dtype: torch.dtype) -> tuple[ModelMixin, Callable[[], Tensor]]:
    """At 512×512: 1024 tokens beside 77 + 256 of the text."""
    with torch.device("meta"):
        network = with_lora(SD3Transformer2DModel(**SD3_MEDIUM), TARGETS, dtype)
    return network, lambda: network(
        hidden_states=empty(1, 16, 64, 64, dtype=BF16), timestep=empty(1), return_dict=False,
        encoder_hidden_states=empty(1, 333, 4096, dtype=BF16), pooled_projections=empty(1, 2048, dtype=BF16),
    )[0]  # fmt: skip


def test_stable_diffusion_3_5_medium() -> None:
    """Trial figures 4.7, 2.61 and 0.20 GiB."""
    assert gib(*sd35_medium(torch.float32)) == pytest.approx((4.7, 2.61, 0.20), rel=0.05)


@pytest.mark.slow
def test_adapters_in_the_dtype_of_the_network_need_a_fifth_less() -> None:
    """Trial figure 2.04 in place of 2.61 GiB."""
    network, call = sd35_medium(BF16)
    assert update_bytes(call, adapters(network)) / GIB == pytest.approx(2.04, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "expected"), [(512, (22.4, 10.1, 0.79)), (1024, (22.4, 30.2, 2.4))])
def test_flux_1(side: int, expected: tuple[float, float, float]) -> None:
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        network = with_lora(FluxTransformer2DModel(**FLUX_1), TARGETS, torch.float32)
    found = gib(
        network,
        lambda: network(
            hidden_states=empty(1, tokens, 64, dtype=BF16), timestep=empty(1), guidance=empty(1), return_dict=False,
            encoder_hidden_states=empty(1, 512, 4096, dtype=BF16), pooled_projections=empty(1, 768, dtype=BF16),
            txt_ids=empty(512, 3), img_ids=empty(tokens, 3),
        )[0],
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_wan_1_3b() -> None:
    """480p, 81 frames: latents 21 × 60 × 104."""
    targets = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
    with torch.device("meta"):
        network = with_lora(WanTransformer3DModel(**WAN_1_3B), targets, torch.float32)
    found = gib(
        network,
        lambda: network(
            hidden_states=empty(1, 16, 21, 60, 104, dtype=BF16), timestep=empty(1), return_dict=False,
            encoder_hidden_states=empty(1, 512, 4096, dtype=BF16),
        )[0],
    )  # fmt: skip
    assert found == pytest.approx((2.7, 102, 7.4), rel=0.05)
