"""FSDP2 for the frozen weights of the trained network.

Adapters and their optimizer are small: every process holds them in full, and `Processes.sum_gradients` adds their
gradients, as without sharding.
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
    """Shards the frozen weights of the policy's network, once, after its roles were added. Returns processes that
    synchronize its calls. Blocks are moved to the processes' device one by one, so the network may be on the CPU before.
    ConfigError for a policy that trains weights which would be sharded."""
    networks = list(policy.modules().values())
    adapters = {parameter for network in networks for name, parameter in network.named_parameters() if ".lora_" in name}
    trained = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    if len(networks) != 1 or not adapters.issuperset(trained):
        raise ConfigError(
            f"got a policy of {len(networks)} networks, {len(trained)} trained tensors and {len(adapters)} adapter tensors; "
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
    """Keeps the collective forwards of a sharded network matched when processes have different numbers of states.

    Each call announces itself. A process with nothing left to evaluate (in `level`) answers every announcement with a call
    on one old row, until no process announces any more. A call with gradients cannot be answered like this, since its
    backward is collective too: trainers make equal numbers of those on all processes (see Update).

    dummy_calls: how many calls this process made only to answer others."""

    network: nn.Module
    device: torch.device | str
    dummy_calls: int = 0
    _in_level: bool = False
    _row: tuple[tuple[Any, ...], dict[str, Any]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.network.register_forward_pre_hook(
            self._before_call, prepend=True, with_kwargs=True
        )  # before FSDP's own hook

    def level(self) -> None:
        """Returns once every process is in here. Must precede any other collective."""
        self._in_level = True
        while (callers := self._count_callers(False).tolist()) != [0, 0]:  # another process calls the network now
            if self._row is None:
                raise RuntimeError("a process that never called the sharded network cannot answer the others' calls")
            if callers[1]:
                raise RuntimeError(
                    "a process has no call with gradients left while another makes one; expected equal numbers on all: "
                    "deal the trained states with Processes.deal, which pads"
                )
            args, kwargs = self._row
            with torch.no_grad():
                self.network(*args, **kwargs)
            self.dummy_calls += 1
        self._in_level = False

    def _before_call(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_level:
            return
        self._count_callers(True)  # a caller does not need the count
        if self._row is None:
            self._row = tuple(_first(a) for a in args), {name: _first(value) for name, value in kwargs.items()}

    def _count_callers(self, calls: bool) -> Tensor:
        """How many processes call the network now, and how many of them with gradients. calls: whether this one does."""
        own = [float(calls), float(calls and torch.is_grad_enabled())]
        callers = torch.tensor(own, device=self.device)
        torch.distributed.all_reduce(callers)
        return callers


def _first(value: Any) -> Any:
    return value[:1].detach().clone() if isinstance(value, Tensor) and value.ndim else value
