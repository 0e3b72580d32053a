"""Counts of what a network multiplies, by dtype, and of the bytes that autograd keeps of it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")


class Multiplications(TorchDispatchMode):
    """Inside, the matrix products and convolutions that run, forward and backward: their number by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            self.dtypes[args[1].dtype] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Gives a list that holds, once the context is left, the bytes that autograd keeps beside parameters, each storage once."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in kept
        if not t.is_leaf or not t.requires_grad
    }
    total.append(sum(storages.values()))
