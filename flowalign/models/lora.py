"""LoRA: strict targets, switching adapters without touching requires_grad, and an export that keeps alpha.

peft's own switches (set_adapter, enable_adapters, diffusers' disable_adapters) change requires_grad and leave the policy
silently frozen; here a role sets two flags of each layer and restores them.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter

ADAPTER = "default"
SD3_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685); defaults of flow_grpo (rank 32, alpha 64, Gaussian init).

    `targets` are module-name suffixes such as "attn.to_q"; one that matches nothing is an error; None means the attention
    layers of the model's family. `dropout` must be 0: it would make the replayed log-prob differ from the stored one."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"got lora.rank={self.rank}, lora.alpha={self.alpha}; expected a rank of at least 1 and alpha > 0"
            )
        if self.dropout:
            raise ValueError(
                f"got lora.dropout={self.dropout}; expected 0, since dropout makes the ratio of an unchanged policy differ "
                "from 1; regularize with trainer.regularizers instead"
            )
        if self.targets is not None and not self.targets:
            raise ValueError(
                "got an empty lora.targets; expected module names such as attn.to_q, or null for the default"
            )


def matched_modules(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` match. ValueError that lists the targets that match nothing."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in linear)]
    if unmatched:
        known = sorted({".".join(_within_block(name)) for name in linear})
        nearest = {t: difflib.get_close_matches(t, known, n=2, cutoff=0.5) for t in unmatched}
        raise ValueError(
            f"got lora.targets {unmatched}, which match no linear layer of {type(network).__name__}; nearest: {nearest}; "
            f"expected some of: {', '.join(known)}"
        )
    return [name for name in linear if any(name == t or name.endswith("." + t) for t in targets)]


def _within_block(name: str) -> list[str]:
    """The part of a module's name behind the block's number: transformer_blocks.3.attn.to_q -> attn, to_q."""
    parts = name.split(".")
    return parts[2:] if len(parts) > 2 and parts[1].isdigit() else parts


def add_lora(network: ModelMixin, lora: LoRA, targets: Sequence[str], seed: int) -> None:
    """Adds fp32 adapters to the `targets` of the network, initialized from `seed` alone; everything else is frozen."""
    network.requires_grad_(False)
    modules = matched_modules(network, targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_adapter(network: ModelMixin, name: str, trained: bool) -> None:
    """Adds an adapter that starts with the policy's weights; the policy's stays active, and every other keeps
    whether it is trained."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    with torch.random.fork_rng(devices=[]), using_adapter(network, ADAPTER), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is intended here
        network.add_adapter(copy.deepcopy(network.peft_config[ADAPTER]), adapter_name=name)
    for parameter, trains in before:
        parameter.requires_grad_(trains)  # peft froze every other adapter
    own = adapter_parameters(network, name)
    for (_, source), (_, target) in zip(adapter_parameters(network, ADAPTER), own, strict=True):
        target.data = source.detach().clone()
        target.requires_grad_(trained)


def adapter_parameters(network: nn.Module, adapter: str) -> list[tuple[str, Parameter]]:
    """The tensors of one adapter, in the network's order, which is the same for every adapter."""
    return [(name, p) for name, p in network.named_parameters() if ".lora_" in name and adapter in name.split(".")]


@contextmanager
def using_adapter(network: nn.Module, adapter: str | None) -> Iterator[None]:
    """A context in which the network runs with this adapter, or without any (None). Sets only two flags of each layer, and
    restores them."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The policy's adapter under peft's names, on the CPU."""
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_peft(network: ModelMixin, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained(network, folder)."""
    config = copy.copy(network.peft_config[ADAPTER])
    config.target_modules = sorted(config.target_modules)  # a set has another order in each process
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(network).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
