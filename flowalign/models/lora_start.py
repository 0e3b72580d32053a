"""The policy's LoRA: from its settings, or from files that hold one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flowalign.models.family import Family
from flowalign.models.lora import (
    LoRA,
    add_lora,
    linear_modules,
    matched_modules,
    set_adapter_weights,
    set_merged_weights,
)
from flowalign.models.lora_file import LoRAFile, read_lora
from flowalign.models.lora_merge import merge_loras


def add_policy_lora(network: nn.Module, name: str, lora: LoRA | str, family: Family, seed: int) -> None:
    if isinstance(lora, str):
        file = read_lora(lora, name)
        lora = LoRA(max(file.ranks.values()), max(file.alphas.values()), file.modules, init=lora)
    targets = family.targets if lora.targets is None else lora.targets
    files = lora_files(lora, name, targets, network)
    add_lora(network, lora, targets, seed)
    if len(files) > 1:
        set_merged_weights(network, merge_loras(files, lora.rank, lora.alpha))
    elif files:
        set_adapter_weights(network, files[0])


def lora_files(lora: LoRA, name: str, targets: Sequence[str], network: nn.Module) -> list[LoRAFile]:
    """The files that the policy's LoRA starts from, for one network. ValueError for one that does not fit: a single one has the
    policy's rank, alpha and layers, several have some of its layers."""
    folders = [lora.init] if isinstance(lora.init, str) else list(lora.init or ())
    files = [read_lora(folder, name) for folder in folders]
    for file in files:
        file.check_modules(linear_modules(network))
        modules = matched_modules(network, targets)
        if len(files) == 1:
            file.check_equal("policy.lora", modules, lora.rank, lora.alpha)
        elif beyond := sorted(set(file.modules) - set(modules)):
            raise ValueError(
                f"got {file.path} in policy.lora.init with adapters at {', '.join(beyond[:3])} ({len(beyond)} in all), which "
                "policy.lora.targets leaves out; expected all of them: add them to the targets"
            )
    return files
