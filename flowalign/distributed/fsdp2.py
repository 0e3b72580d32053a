"""FSDP2 for the networks of a policy: the frozen weights beside LoRAs, or all weights where they are trained.

Adapters and their optimizer are small: every process holds them in full, and `Processes.sum_gradients` adds their
gradients, as without sharding. Of weights that are trained, gradients, optimizer state and averages are sharded as they
are; each backward adds up the gradients of all processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.models import Policy

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)


def shard(
    policy: Policy, processes: Processes, reshard_after_forward: bool = True, compute: torch.dtype | None = None
) -> Processes:
    """Shards the weights of the policy's networks, those of its copies too, once, after its roles were added. Returns processes
    that synchronize their calls. Blocks come to the processes' device one by one, with the numbers of the first process: its
    networks may be on the CPU before, those of the others on the meta device, so that they are read and held once.

    Adapters stay whole. compute: the dtype in which trained weights are gathered and called, under autocast; their shards and
    gradients are fp32. None: their own. ConfigError for a policy that trains adapters and other weights."""
    networks = policy.networks()
    adapters = {parameter for network in networks for name, parameter in network.named_parameters() if ".lora_" in name}
    trained = {parameter for network in networks for parameter in network.parameters() if parameter.requires_grad}
    if adapters and not adapters.issuperset(trained):
        raise ConfigError(
            f"got a policy with {len(trained)} trained tensors and {len(adapters)} adapter tensors; expected networks that are "
            "frozen but for their adapters, or without any: launch with configs/accelerate/multi_gpu.yaml"
        )
    full = bool(trained) and not adapters
    precision = MixedPrecisionPolicy()
    if full and compute is not None:
        precision = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    mesh = mesh_of(processes)
    for network in networks:
        blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
        filled = set[nn.Module]()
        for module in (*blocks, network):
            _fill([part for part in module.modules() if part not in filled], processes.device)
            filled |= set(module.modules())
            whole = {parameter for name, parameter in module.named_parameters() if ".lora_" in name}
            sharded = fully_shard(
                module, mesh=mesh, ignored_params=whole, mp_policy=precision,
                reshard_after_forward=reshard_after_forward or full,  # what is stepped is the shards
            )  # fmt: skip
            sharded.set_gradient_divide_factor(1.0)  # losses are divided by the global count already
            sharded.set_force_sum_reduction_for_comms(True)
    return replace(processes, level=Lockstep(networks, processes.device).level)


def _fill(parts: Sequence[nn.Module], device: torch.device | str) -> None:
    """Afterwards the parts' own tensors are on the device, with the numbers of the first process. Collective."""
    own = [
        (part, name, tensor)
        for part in parts
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    ]
    if not own:
        return
    kinds = torch.tensor([DTYPES.index(tensor.dtype) for _, _, tensor in own], device=device)
    torch.distributed.broadcast(kinds, src=0)  # some weights of a bf16 network are fp32, which only its file knows
    for (part, name, tensor), kind in zip(own, kinds.tolist(), strict=True):
        if torch.distributed.get_rank() == 0:
            sent = tensor.detach().to(device).contiguous()
        else:
            sent = torch.empty(tensor.shape, dtype=DTYPES[kind], device=device)
        torch.distributed.broadcast(sent, src=0)
        if isinstance(tensor, nn.Parameter):
            setattr(part, name, nn.Parameter(sent, requires_grad=tensor.requires_grad))
        else:
            part.register_buffer(name, sent, persistent=name in part.state_dict(keep_vars=True))


def mesh_of(processes: Processes) -> DeviceMesh:
    """All processes; of several machines with several processes each [machines, processes of each]: sharded inside a machine,
    replicated across them, since a machine's own links are the faster ones."""
    device, local = torch.device(processes.device).type, int(os.environ.get("LOCAL_WORLD_SIZE", processes.count))
    if 1 < local < processes.count and processes.count % local == 0:
        return init_device_mesh(device, (processes.count // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (processes.count,))


@dataclass
class Lockstep:
    """Keeps the collective forwards of sharded networks matched when processes have different numbers of states.

    Each call announces itself. A process with nothing left to evaluate (in `level`) answers every announcement with a call
    on one old row, under the autocast of that row, until no process announces any more. Where processes announce different networks, the first in order has
    its turn, and the others answer it before they announce theirs again. A call with gradients cannot be answered like this,
    since its backward is collective too: trainers make equal numbers of those on all processes (see Update), and a family of
    several networks then calls the same ones in the same order on all.

    dummy_calls: how many calls this process made only to answer others."""

    networks: Sequence[nn.Module]
    device: torch.device | str
    dummy_calls: int = 0
    _answers: bool = False
    _rows: dict[int, tuple[tuple[Any, ...], dict[str, Any], bool]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for number, network in enumerate(self.networks):
            network.register_forward_pre_hook(
                partial(self._before_call, number), prepend=True, with_kwargs=True
            )  # before FSDP's own hook

    @property
    def _kind(self) -> str:
        return torch.device(self.device).type

    def level(self) -> None:
        """Returns once every process is in here. Must precede any other collective."""
        while (turn := self._announce(None)) is not None:  # another process calls a network now
            self._answer(turn)

    def _before_call(self, number: int, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._answers:
            return
        while (turn := self._announce(number)) != number:
            self._answer(turn)
        if number not in self._rows:
            autocast = torch.is_autocast_enabled(self._kind)
            rows = len(args[0] if args else next(iter(kwargs.values())))
            self._rows[number] = _first(args, rows), _first(kwargs, rows), autocast

    def _answer(self, turn: int | None) -> None:
        """Calls the network whose turn it is, for the other processes' sake."""
        if turn is None or turn not in self._rows:
            raise RuntimeError("a process that never called the sharded network cannot answer the others' calls")
        args, kwargs, autocast = self._rows[turn]
        self._answers = True
        with torch.no_grad(), torch.autocast(self._kind, torch.bfloat16, enabled=autocast):
            self.networks[turn](*args, **kwargs)
        self._answers = False
        self.dummy_calls += 1

    def _announce(self, number: int | None) -> int | None:
        """The number of the network whose turn it is, None if no process calls one. number: the one that this process calls
        now. RuntimeError if not all processes call that network and one does so with gradients."""
        own = [float(number == other) for other in range(len(self.networks))]
        callers = torch.tensor([*own, float(number is not None and torch.is_grad_enabled())], device=self.device)
        torch.distributed.all_reduce(callers)
        *calls, trained = callers.tolist()
        turn = next((other for other, count in enumerate(calls) if count), None)
        if trained and number != turn:
            raise RuntimeError(
                "a process has no call with gradients left while another makes one, or makes it of another network; expected "
                "equal calls on all: deal the trained states with Processes.deal, which pads"
            )
        return turn


def _first(value: Any, rows: int) -> Any:
    """Of the arguments of a call of `rows` rows those of the first; what has no rows, such as the positions of tokens, as it is. A
    list has a row in each place."""
    if isinstance(value, dict):
        return {name: _first(each, rows) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_first(each, rows) for each in value)
    if isinstance(value, list):
        return [each.detach().clone() if isinstance(each, Tensor) else each for each in value[:1]]
    if not isinstance(value, Tensor):
        return value
    return (value[:1] if value.ndim and len(value) == rows else value).detach().clone()
