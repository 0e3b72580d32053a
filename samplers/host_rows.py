"""Rows that leave the device as they are made."""

import torch
from torch import Tensor


class HostRows:
    """At most `most` rows [n, *] on the host, added part by part. Those of a CUDA device go into pinned memory without being
    waited for: `rows` holds them once the device is done, after any later copy of its own to the host, say."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._buffer: Tensor | None = None

    def add(self, values: Tensor, chosen: Tensor) -> None:
        """The rows of `values` [n, *] that `chosen` [n], a mask on the host, names. All calls: one dtype, one shape of a row."""
        if self._buffer is None:
            shape = (self._most, *values.shape[1:])
            self._buffer = torch.empty(shape, dtype=values.dtype, pin_memory=values.is_cuda)
        index = chosen.nonzero().flatten()
        self._buffer[self._count : self._count + len(index)].copy_(values[index.to(values.device)], non_blocking=True)
        self._count += len(index)

    @property
    def rows(self) -> Tensor:
        """[n, *] what was added. ValueError if `add` was never called, so that no shape is known."""
        if self._buffer is None:
            raise ValueError("got the rows of a HostRows that nothing was added to; expected at least one call of add")
        return self._buffer[: self._count]
