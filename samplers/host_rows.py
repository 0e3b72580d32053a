"""Rows that leave the device as they are made."""

import torch
from torch import Tensor

from samplers.transfer import fetch


class HostRows:
    """At most `most` rows [n, *] on the host, added part by part. Those of a device go into pinned memory without being
    waited for: `rows` holds them once the device is done, after any later copy to the host that is waited for, say."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._buffer: Tensor | None = None
        self._last: Tensor | None = None

    def read(self) -> Tensor:
        """`rows`, waited for."""
        if self._last is not None:
            fetch([self._last])
        return self.rows

    def add(self, rows: Tensor) -> None:
        """rows [n, *]. All calls: one dtype, one shape of a row."""
        if self._buffer is None:
            shape, pinned = (self._most, *rows.shape[1:]), rows.device.type != "cpu"
            self._buffer = torch.empty(shape, dtype=rows.dtype, pin_memory=pinned)
        self._buffer[self._count : self._count + len(rows)].copy_(rows, non_blocking=True)
        self._count += len(rows)
        self._last = rows.flatten()[:1].clone() if rows.numel() else self._last

    @property
    def rows(self) -> Tensor:
        """[n, *] what was added. ValueError if `add` was never called, so that no shape is known."""
        if self._buffer is None:
            raise ValueError("got the rows of a HostRows that nothing was added to; expected at least one call of add")
        return self._buffer[: self._count]
