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

from flowalign.models.lora_dtype import multiply_in_input_dtype
from flowalign.models.lora_file import LoRAFile
from flowalign.models.lora_merge import MergedLoRA

ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685); defaults of flow_grpo (rank 32, alpha 64, Gaussian init).

    `targets` are module-name suffixes such as "attn.to_q"; one that matches nothing is an error; None means the attention
    layers of the model's family. `dropout` must be 0: it would make the replayed log-prob differ from the stored one.
    `init`: a LoRA to start from, of the same rank, alpha and targets (a run folder or its lora/, or what diffusers'
    save_lora_weights wrote); or several, of any rank and alpha, to start from the mean of what they change (`merge_loras`, exact
    if `rank` is at least the sum of theirs). The reference is still the model without them."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    init: str | tuple[str, ...] | None = None

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
        if isinstance(self.init, tuple) and len(self.init) < 2:
            raise ValueError(
                f"got lora.init={list(self.init)}; expected at least two folders to merge, or one as a text"
            )
        if self.targets is not None and not self.targets:
            raise ValueError(
                "got an empty lora.targets; expected module names such as attn.to_q, or null for the default"
            )


def linear_modules(network: nn.Module) -> list[str]:
    """Names of the linear layers, which a LoRA may adapt. An adapted one counts by its own name, its parts do not."""
    tuners = tuple(name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))
    inside = tuple(f"{name}." for name in tuners)
    plain = (name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return [*tuners, *(name for name in plain if not name.startswith(inside))] if tuners else list(plain)


def matched_modules(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` match. ValueError that lists the targets that match nothing."""
    linear = linear_modules(network)
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


def base_adapters(network: ModelMixin) -> tuple[str, ...]:
    """The adapters that a user has loaded and left active: part of the base, under every role. Their tensors are frozen.

    ValueError for one with the policy's own name, or for fused ones, which peft would take out again."""
    layers = lora_layers(network)
    if not layers:
        return ()
    if ADAPTER in network.peft_config:
        raise ValueError(
            f"got a network with an adapter named {ADAPTER!r}, the name of the policy's own; expected another: load the LoRA "
            "with another adapter_name"
        )
    if any(layer.merged for layer in layers):
        raise ValueError(
            "got a network with fused adapters, which a role would undo; expected them active or merged for good: call "
            "pipe.unfuse_lora() first, or save the fused pipeline and load that"
        )
    return () if layers[0].disable_adapters else tuple(layers[0].active_adapters)


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    """The network's layers that have adapters."""
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def adapter_switches(network: nn.Module) -> list[str]:
    """What of its adapters beside their weights decides what the network answers, a text per layer: which are active, and how
    strongly."""
    return [
        f"{layer.disable_adapters} {list(layer.active_adapters)} {sorted(layer.scaling.items())}"
        for layer in lora_layers(network)
    ]


def add_lora(network: ModelMixin, lora: LoRA, targets: Sequence[str], seed: int) -> None:
    """Adds fp32 adapters to the `targets` of the network, initialized from `seed` alone; everything else is frozen."""
    network.requires_grad_(False)
    modules = matched_modules(network, targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]), _second_adapter_is_intended():  # peft draws from the global generator
        torch.manual_seed(seed)
        network.add_adapter(config, adapter_name=ADAPTER)
    for _, parameter in adapter_parameters(network, ADAPTER):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    multiply_in_input_dtype(network)


@torch.no_grad()
def set_adapter_weights(network: nn.Module, file: LoRAFile) -> None:
    """Gives the policy's adapter the weights of a file with the same modules, rank and alpha."""
    weights = file.tensors()
    for name, parameter in adapter_parameters(network, ADAPTER):
        parameter.copy_(weights[name.replace(f".{ADAPTER}.", ".")])


@torch.no_grad()
def set_merged_weights(network: nn.Module, merged: MergedLoRA) -> None:
    """Gives the policy's adapter the factors of a merged LoRA. What they do not fill keeps its initial A, and B = 0, so that it
    does nothing yet and can still learn."""
    for name, parameter in adapter_parameters(network, ADAPTER):
        module, _, side = name.removesuffix(f".{ADAPTER}.weight").rpartition(".lora_")
        if side == "B":
            parameter.zero_()
        if module in merged.factors:
            a, b = (factor.to(parameter) for factor in merged.factors[module])
            if side == "A":
                parameter[: len(a)] = a
            else:
                parameter[:, : b.shape[1]] = b


def add_adapter(network: ModelMixin, name: str, trained: bool, zero: bool) -> None:
    """Adds an adapter that starts with the policy's weights; zero: with B = 0, so that it does nothing yet."""
    with _kept_switches(network), torch.random.fork_rng(devices=[]), _second_adapter_is_intended():
        network.add_adapter(copy.deepcopy(network.peft_config[ADAPTER]), adapter_name=name)
    own = adapter_parameters(network, name)
    for (_, source), (target_name, target) in zip(adapter_parameters(network, ADAPTER), own, strict=True):
        if not source.is_meta:  # of a process that gets its numbers from another (flowalign.distributed.fsdp2)
            target.data = source.detach().clone()
        if zero and ".lora_B." in target_name:
            target.data.zero_()
        target.requires_grad_(trained)


def load_adapter(network: ModelMixin, name: str, file: LoRAFile, trained: bool) -> None:
    """Adds the LoRA of a file as an adapter, in fp32, with the alpha of each of its modules."""
    weights = file.tensors()
    with _kept_switches(network), torch.random.fork_rng(devices=[]), _second_adapter_is_intended():
        network.load_lora_adapter(weights, prefix=None, adapter_name=name, metadata=file.peft_settings())
    for key, parameter in adapter_parameters(network, name):
        parameter.data = weights[key.replace(f".{name}.", ".")].to(parameter.device, torch.float32)
        parameter.requires_grad_(trained)
    multiply_in_input_dtype(network)


@contextmanager
def _kept_switches(network: nn.Module) -> Iterator[None]:
    """Afterwards every parameter requires a gradient as before, and every layer has the adapters active that it had; a layer
    that is new has those of the others."""
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    active = list(lora_layers(network)[0]._active_adapter)
    yield
    for parameter, requires_grad in required:
        parameter.requires_grad_(requires_grad)
    for layer in lora_layers(network):
        layer._disable_adapters, layer._active_adapter = False, active


@contextmanager
def _second_adapter_is_intended() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


def adapter_parameters(network: nn.Module, adapter: str) -> list[tuple[str, Parameter]]:
    """The tensors of one adapter, in the network's order, which is the same for every adapter."""
    named = ((name, name.rpartition(".lora_")[2].split("."), p) for name, p in network.named_parameters())
    return [(name, parameter) for name, inside, parameter in named if ".lora_" in name and inside[1:2] == [adapter]]


@contextmanager
def using_adapters(layers: Sequence[BaseTunerLayer], adapters: Sequence[str]) -> Iterator[None]:
    """A context in which the layers run with these adapters, or without any. Sets only two flags of each layer, and restores
    them."""
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        activate(layers, adapters)
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def activate(layers: Sequence[BaseTunerLayer], adapters: Sequence[str]) -> None:
    """The layers run with these adapters from now on, or without any."""
    for layer in layers:
        layer._disable_adapters = not adapters
        if adapters:
            layer._active_adapter = list(adapters)


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
