"""How many bytes a computation holds at once, measured on the meta device: shapes and dtypes without numbers.

Nothing is computed and nothing is allocated, so a network of any size is measured on any machine, by its own forward and
backward. Every storage that an operation makes counts until it is freed, as an allocator would count it; what was there before
(weights, inputs) does not. Not kept: workspaces of kernels, the allocator's rounding and fragmentation, what a compiler fuses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts the storages made inside it. live: bytes of those that are still there. peak: the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}  # address of a storage -> its bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each.untyped_storage() for each in tree_leaves(result) if _on_meta(each)]
        if new := [storage for storage in made if storage._cdata not in self._known]:
            given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if _on_meta(each)}
            for storage in new:
                if storage._cdata not in given:  # else a view of what was there before, or written in place
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:  # one operation may return a storage twice
            return
        self._known[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _free(self, address: int) -> None:
        self.live -= self._known.pop(address)


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def forward_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that `call`, such as a network's forward or a decoder, holds at once without gradient."""
    with torch.no_grad(), fused_attention(), LiveBytes() as bytes_:
        call()
    return bytes_.peak


def update_bytes(call: Callable[[], Tensor], parameters: Sequence[Parameter]) -> int:
    """The most bytes that the forward and backward of `call() [n, *]` hold at once: activations, under checkpointing those of the
    blocks' inputs and of one block. The gradients of `parameters` are there before and not counted."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with fused_attention(), LiveBytes() as bytes_:
        output = call()
        torch.autograd.backward(output, torch.empty_like(output))
    for parameter in parameters:
        parameter.grad = None
    return bytes_.peak


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention stores what a fused kernel stores: its inputs, its output and a log-sum-exp per query. On the meta device
    torch would take the unfused one, whose matrix of scores no GPU kernel of it has."""
    # not a TorchFunctionMode: the recomputation of activation checkpointing would not run under it
    unfused = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = unfused


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention by the one fused kernel that takes every dtype and mask."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.size(-3) // each.size(-3), -3) for each in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output
