"""Tensors that FSDP2 shards over processes, whole for a file and back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """A sharded tensor in full, on the CPU; of another process, which does not `keep` it, nothing of it. Collective. Any other
    tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor().detach()
    return full.cpu() if keep else full.new_empty(0, device="cpu")


def sharded_as(target: Tensor, value: Tensor) -> Tensor:
    """`value` [*], which every process has in full, sharded as `target` is; as it is if that is not sharded."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
