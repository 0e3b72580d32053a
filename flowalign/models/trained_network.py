"""The trained network under its roles: which weights it runs with, and which parameters belong to which role."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import ModelMixin
from torch import nn
from torch.nn import Parameter

from flowalign.models.lora import ADAPTER, adapter_parameters, add_adapter, using_adapter
from flowalign.models.roles import BUILT_IN, Role, check_roles, follow


class TrainedNetwork:
    """One network under its roles. "policy" is what is trained: the LoRA if the network has one, else all weights.

    With a LoRA, "reference" is the network without its adapters and further roles are adapters on the same base. With full
    weights, "reference" is `frozen`, a copy, and further roles are copies too. `active` is the network to call now."""

    def __init__(self, network: ModelMixin, frozen: nn.Module | None) -> None:
        self.network = network
        self.active: nn.Module = network
        self._copies: dict[str, nn.Module] = {} if frozen is None else {"reference": frozen}
        self._roles: dict[str, Role] = {}

    @property
    def has_lora(self) -> bool:
        return bool(self.network._hf_peft_config_loaded)

    def networks(self) -> list[nn.Module]:
        """See Policy.networks."""
        return [self.network, *self._copies.values()]

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        """See Policy.add_roles."""
        check_roles(roles)
        for name, role in roles.items():
            trained = role.update == "trained"
            if self.has_lora:
                add_adapter(self.network, name, trained)
            else:
                self._copies[name] = copy.deepcopy(self.network).requires_grad_(trained)
            self._roles[name] = role

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        """See Policy.parameters_of."""
        if role in self._copies:
            return [(f"{role}:{name}", parameter) for name, parameter in self._copies[role].named_parameters()]
        if role not in ("policy", *self._roles):
            raise self._unknown(role)
        if self.has_lora:
            return adapter_parameters(self.network, ADAPTER if role == "policy" else role)
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]

    def follow(self, step: int) -> None:
        """See Policy.follow."""
        for name, role in self._roles.items():
            follow(role, step, self.parameters_of("policy"), self.parameters_of(name))

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """See Policy.role."""
        if name not in ("policy", "reference", *self._roles):
            raise self._unknown(name)
        if self.has_lora:
            adapter = {"policy": ADAPTER, "reference": None}.get(name, name)
            with using_adapter(self.network, adapter):
                yield
        elif name == "reference" and name not in self._copies:
            raise ValueError(
                "got the role 'reference' of a policy that trains full weights without a frozen copy; expected a copy: set "
                "policy.reference_copy=true (it doubles the memory of the network), or trainer.regularizers={}"
            )
        else:
            before, self.active = self.active, self._copies.get(name, self.network)
            try:
                yield
            finally:
                self.active = before

    def _unknown(self, name: str) -> ValueError:
        return ValueError(
            f"got role {name!r}; expected one of {', '.join((*BUILT_IN, *self._roles))}: add it under policy.roles"
        )
