"""The trained networks under their roles: which weights they run with, and which parameters belong to which role."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from flowalign.models.lora import ADAPTER, adapter_parameters, add_adapter, load_adapter, lora_layers, using_adapters
from flowalign.models.lora_file import read_lora
from flowalign.models.roles import BUILT_IN, Role, check_roles, follow, in_order
from flowalign.models.shipped import resolve


class TrainedNetworks:
    """The networks of a policy, one or several, by name, under their roles. "policy" is what is trained: the LoRA if the
    networks have one, else all weights.

    With a LoRA, "reference" is the networks without it and further roles are adapters on the same base. With full weights,
    "reference" is `frozen`, a copy, and further roles are copies too. base: the adapters of each network that belong to its
    base and are active under every role. `active` are the networks to call now, `current` is the role."""

    def __init__(
        self, networks: Mapping[str, ModelMixin], *, has_lora: bool, frozen: Mapping[str, nn.Module] | None = None,
        base: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.networks = networks
        self.has_lora = has_lora
        self.active: Mapping[str, nn.Module] = networks
        self.current = "policy"
        self._base = base or dict.fromkeys(networks, ())
        self._copies: dict[str, Mapping[str, nn.Module]] = {} if frozen is None else {"reference": frozen}
        self._roles: dict[str, Role] = {}
        self._layers: dict[str, list[BaseTunerLayer]] = {}

    def everything(self) -> list[nn.Module]:
        """See Policy.networks."""
        return [*self.networks.values(), *(network for copies in self._copies.values() for network in copies.values())]

    @property
    def role_count(self) -> int:
        """How many roles there are, the policy and the reference among them."""
        return len(BUILT_IN) + len(self._roles)

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        """See Policy.add_roles."""
        check_roles({**self._roles, **roles})
        for name, role in roles.items():
            if name in self._roles or any(name in base for base in self._base.values()):
                raise ValueError(f"got the role {name!r} twice, or as a loaded adapter; expected a new name: rename it")
            trained = role.update == "trained"
            if self.has_lora:
                self._add_adapters(name, role, trained)
            else:
                self._copies[name] = self._copied(role, trained)
            self._roles[name] = role
        self._layers.clear()

    def _add_adapters(self, name: str, role: Role, trained: bool) -> None:
        for component, network in self.networks.items():
            if role.folder is None:
                add_adapter(network, name, trained, zero=role.init == "reference")
                continue
            file, own = read_lora(role.folder, component), network.peft_config[ADAPTER]
            if role.follows:
                file.check_equal(f"the role {name}, which follows {role.of}", own.target_modules, own.r, own.lora_alpha)
            load_adapter(network, name, file, trained)

    def _copied(self, role: Role, trained: bool) -> dict[str, nn.Module]:
        if role.folder is not None:
            return {name: self._read(role.folder, name).requires_grad_(trained) for name in self.networks}
        source = self._reference() if role.init == "reference" else self.networks
        return {name: copy.deepcopy(network).requires_grad_(trained) for name, network in source.items()}

    def _read(self, pipeline: str, name: str) -> ModelMixin:
        """The network `name` of another pipeline, where and as the policy's own is."""
        own = self.networks[name]
        read: ModelMixin = type(own).from_pretrained(resolve(pipeline), subfolder=name, torch_dtype=own.dtype)
        return read.eval().to(own.device)

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        """See Policy.parameters_of. With several networks a name begins with the network's."""
        if role not in ("policy", *self._roles, *self._copies):
            raise self._unknown(role)
        several = len(self.networks) > 1
        return [
            (f"{name}.{key}" if several else key, parameter)
            for name, network in self.networks.items()
            for key, parameter in self._parameters_of(role, name, network)
        ]

    def _parameters_of(self, role: str, name: str, network: nn.Module) -> list[tuple[str, Parameter]]:
        if role in self._copies:
            return [(f"{role}:{key}", parameter) for key, parameter in self._copies[role][name].named_parameters()]
        if self.has_lora:
            return adapter_parameters(network, ADAPTER if role == "policy" else role)
        return [(key, parameter) for key, parameter in network.named_parameters() if parameter.requires_grad]

    def follow(self, step: int) -> None:
        """See Policy.follow."""
        for name in in_order(self._roles):
            role = self._roles[name]
            follow(role, step, self.parameters_of(role.of), self.parameters_of(name))

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """See Policy.role."""
        if name not in ("policy", "reference", *self._roles):
            raise self._unknown(name)
        before = self.current, self.active
        with ExitStack() as leaving:
            if self.has_lora:
                own = {"policy": [ADAPTER], "reference": []}.get(name, [name])
                for component, layers in self._adapted_layers().items():
                    leaving.enter_context(using_adapters(layers, [*self._base[component], *own]))
            else:
                self.active = self._reference() if name == "reference" else self._copies.get(name, self.networks)
            self.current = name
            try:
                yield
            finally:
                self.current, self.active = before

    def _adapted_layers(self) -> dict[str, list[BaseTunerLayer]]:
        """The layers with adapters of each network. Found once: a walk over all modules takes milliseconds."""
        if not self._layers:
            self._layers = {name: lora_layers(network) for name, network in self.networks.items()}
        return self._layers

    def _reference(self) -> Mapping[str, nn.Module]:
        if "reference" not in self._copies:
            raise ValueError(
                "got the role 'reference' of a policy that trains full weights without a frozen copy; expected a copy: set "
                "policy.reference_copy=true (it doubles the memory of the network), or trainer.regularizers={}"
            )
        return self._copies["reference"]

    def _unknown(self, name: str) -> ValueError:
        return ValueError(
            f"got role {name!r}; expected one of {', '.join((*BUILT_IN, *self._roles))}: add it under policy.roles"
        )


def recomputed(trained: TrainedNetworks) -> Callable[..., Any]:
    """For `ModelMixin.enable_gradient_checkpointing`: a call of a block that stores no activations. Its backward computes them
    again under the role of the forward, wherever it runs.

    A function, since a copy of the network shares it where it would copy an object."""

    def call(block: Callable[..., Any], *inputs: Any) -> Any:
        role = trained.current

        def under_role(*inputs: Any) -> Any:
            with nullcontext() if trained.current == role else trained.role(role):
                return block(*inputs)

        # networks are in eval mode and draw nothing
        return checkpoint(under_role, *inputs, use_reentrant=False, preserve_rng_state=False)

    return call
