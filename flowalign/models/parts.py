"""What policies of every family share: the trained network under its roles, and the store of encoded prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import nn
from torch.nn import Parameter

from flowalign.models.base import Conditions
from flowalign.models.lora import adapters_off


class TrainedNetwork:
    """One network under its roles. "policy" is what is trained: the LoRA if the network has one, else all weights.

    "reference" is the network without its adapters, or `frozen`, a copy kept beside full weights. `active` is what
    answers now."""

    def __init__(self, network: ModelMixin, frozen: nn.Module | None) -> None:
        self.network = network
        self.frozen = frozen
        self.active: nn.Module = network

    @property
    def has_lora(self) -> bool:
        return bool(self.network._hf_peft_config_loaded)

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """See Policy.role."""
        if name not in ("policy", "reference"):
            raise ValueError(f"role {name!r} came; expected 'policy' or 'reference'")
        if name == "policy":
            yield
        elif self.has_lora:
            with adapters_off(self.network):
                yield
        elif self.frozen is None:
            raise ValueError(
                "full weights are trained and no frozen copy was kept, so there is no reference: set kl.beta=0, or "
                "policy.reference_copy=true (it doubles the memory of the network)"
            )
        else:
            before, self.active = self.active, self.frozen
            try:
                yield
            finally:
                self.active = before


class PromptStore:
    """Encoded prompts by text: each distinct text goes through the encoders once per run; `encoded` counts them."""

    def __init__(self, encode: Callable[[list[str]], Conditions]) -> None:
        self._encode = encode
        self._rows: dict[str, Conditions] = {}

    @property
    def encoded(self) -> int:
        return len(self._rows)

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._rows]
        if new:
            whole = self._encode(new)
            self._rows |= {text: whole.rows(torch.tensor([row])) for row, text in enumerate(new)}
        return Conditions.cat([self._rows[text] for text in prompts])
