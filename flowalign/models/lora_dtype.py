"""LoRA layers that multiply in the dtype of their input: adapters are fp32 for the optimizer, the network around them bf16."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


def multiply_in_input_dtype(network: nn.Module) -> None:
    """Lets every adapted linear layer of the network, and all its adapters, multiply as `_forward` does."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W·x + Σ_a B_a·((α/r)·A_a·x) over the active adapters, A and B cast to the dtype of x [..., in].

    peft casts x to fp32, multiplies there and scales the wide output: a copy of each activation is kept for the backward, and fp32
    products are slow. In fp32 peft's own forward runs, bit for bit, since another place of α/r would round differently where
    it is no power of two; so it does for what else peft may ask of a layer (merged, per-row and DoRA adapters, biases)."""
    special = layer.disable_adapters or layer.merged or layer.lora_variant or any(layer.lora_bias.values())
    if x.dtype == torch.float32 or special or kwargs:
        plain: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return plain
    result: Tensor = layer.base_layer(x, *args)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = (side[adapter].weight.to(x.dtype) for side in (layer.lora_A, layer.lora_B))
            low = F.linear(layer.lora_dropout[adapter](x), a) * layer.scaling[adapter]
            result = result + F.linear(low, b)
    return result
