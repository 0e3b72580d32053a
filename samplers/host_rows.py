"""Rows that leave the device as they are made."""

import torch
from torch import Tensor


class HostRows:
    """At most `most` rows [n, *] on the host, added part by part. Those of a device go into pinned memory without being
    waited for: `rows` holds them once the device is done, after any later copy to the host that is waited for, say."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._buffer: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """rows [n, *]. All calls: one dtype, one shape of a row."""
        if self._buffer is None:
            shape, pinned = (self._most, *rows.shape[1:]), rows.device.type != "cpu"
            self._buffer = torch.empty(shape, dtype=rows.dtype, pin_memory=pinned)
        self._buffer[self._count : self._count + len(rows)].copy_(rows, non_blocking=True)
        self._count += len(rows)

    @property
    def rows(self) -> Tensor:
        """[n, *] what was added. ValueError if `add` was never called, so that no shape is known."""
        if self._buffer is None:
            raise ValueError("got the rows of a HostRows that nothing was added to; expected at least one call of add")
        return self._buffer[: self._count]
