"""FSDP2 for the frozen weights of the network that is trained.

Adapters and their optimizer are small: they stay whole on every process, and `Processes.sum_gradients` adds their
gradients as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.models import Policy


def shard(policy: Policy, processes: Processes, reshard_after_forward: bool = True) -> Processes:
    """Shards the frozen weights of the policy's network, once, after its roles were added; what comes back keeps the
    processes in step. Blocks come to the processes' device one by one, so the network may lie on the CPU before.
    ConfigError for a policy that trains what it would shard."""
    networks = list(policy.modules().values())
    adapters = {parameter for network in networks for name, parameter in network.named_parameters() if ".lora_" in name}
    trained = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    if len(networks) != 1 or not adapters.issuperset(trained):
        raise ConfigError(
            f"a policy of {len(networks)} networks, {len(trained)} trained tensors and {len(adapters)} of adapters came; "
            "expected one network that is frozen but for its adapters: launch with configs/accelerate/multi_gpu.yaml"
        )
    [network] = networks
    mesh = init_device_mesh(torch.device(processes.device).type, (processes.count,))
    blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
    for parameter in adapters:
        parameter.data = parameter.data.to(processes.device)
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, ignored_params=adapters, reshard_after_forward=reshard_after_forward)
    return replace(processes, level=Lockstep(network, processes.device).level)


@dataclass
class Lockstep:
    """A sharded network's forward is collective, but processes have different numbers of states to evaluate.

    Each call announces itself; who has nothing left to evaluate (`level`) answers every announcement with a call of its
    own on one old row, until nobody announces any more. A call with gradients cannot be answered so, since its backward
    is collective too: trainers make equal numbers of those (see Update)."""

    network: nn.Module
    device: torch.device | str
    made_up: int = 0
    _levelling: bool = False
    _row: tuple[tuple[Any, ...], dict[str, Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.network.register_forward_pre_hook(self._called, prepend=True, with_kwargs=True)  # before FSDP's own

    def level(self) -> None:
        """Returns when every process is here. Comes before any other collective."""
        self._levelling = True
        while (others := self._sum(False).tolist()) != [0, 0]:  # somebody calls the network now
            if self._row is None:
                raise RuntimeError("a process that never called the sharded network cannot answer the others' calls")
            if others[1]:
                raise RuntimeError(
                    "a process has no call with gradients left while another makes one; expected equal numbers on all: "
                    "deal the trained states with Processes.deal, which pads"
                )
            args, kwargs = self._row
            with torch.no_grad():
                self.network(*args, **kwargs)
            self.made_up += 1
        self._levelling = False

    def _called(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._levelling:
            return
        self._sum(True)  # who calls need not know who else does
        if self._row is None:
            self._row = tuple(_first(a) for a in args), {name: _first(value) for name, value in kwargs.items()}

    def _sum(self, calls: bool) -> Tensor:
        """How many call the network now, and how many of them with gradients."""
        mine = [float(calls), float(calls and torch.is_grad_enabled())]
        callers = torch.tensor(mine, device=self.device)
        torch.distributed.all_reduce(callers)
        return callers


def _first(value: Any) -> Any:
    return value[:1].detach().clone() if isinstance(value, Tensor) and value.ndim else value
