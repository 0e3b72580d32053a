"""Between the host and a device: many tensors by one copy, and rows that leave the device as they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: where a tensor of any dtype may begin


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows [n] that are taken of tensors: their `numbers` on the host, and `there`, beside what they are taken of."""

    numbers: Tensor
    there: Tensor

    @staticmethod
    def beside(values: Tensor, numbers: Tensor) -> "Rows":
        """The rows `numbers` [n] of the host, to be taken of `values`."""
        rows = Rows(numbers, numbers)
        return rows if rows.all_of(values) else Rows(numbers, *send(values.device, numbers))

    def then(self, rows: "Rows") -> "Rows":
        """The rows `rows` [m] of these: what `rows.of(self.of(values))` takes of values."""
        return Rows(self.numbers[rows.numbers], self.there[rows.there])

    def __len__(self) -> int:
        return len(self.numbers)

    def all_of(self, values: Tensor) -> bool:
        """Whether they are all rows of `values` [N, *] in order."""
        return len(self) == len(values) and bool((self.numbers == torch.arange(len(self))).all())

    def of(self, values: Tensor) -> Tensor:
        """[n, *] of `values` [N, *]; itself, not a copy, where they are all of it."""
        return values if self.all_of(values) else values[self.there]

    def split(self, size: int) -> "list[Rows]":
        """Parts of at most `size`; none of no rows."""
        if not len(self):
            return []
        return [Rows(*part) for part in zip(self.numbers.split(size), self.there.split(size), strict=True)]


def send(device: torch.device | str, *tensors: Tensor) -> list[Tensor]:
    """`tensors` on `device`. Those of the host go there by one copy, out of pinned memory, which the host does not wait for; where
    `device` is the host they are themselves. One that has a graph, which it keeps, or no numbers goes by itself."""
    device = torch.device(device)
    if device.type == "cpu":
        return list(tensors)
    waiting = [
        n for n, each in enumerate(tensors) if each.device.type == "cpu" and each.numel() and not each.requires_grad
    ]
    starts, size = [], 0
    for number in waiting:
        starts.append(size)
        size += -(-tensors[number].nbytes // _ALIGNED) * _ALIGNED
    found = [
        each if n in waiting or each.numel() else each.new_empty(each.shape, device=device)
        for n, each in enumerate(tensors)
    ]
    found = [each.to(device) if each.requires_grad else each for each in found]
    if not waiting:
        return found
    packed = _host_memory([size], torch.uint8, device)
    for number, start in zip(waiting, starts, strict=True):
        _at(packed, start, tensors[number]).copy_(tensors[number])
    sent = packed.to(device, non_blocking=True)
    for number, start in zip(waiting, starts, strict=True):
        found[number] = _at(sent, start, tensors[number])
    return found


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` on the host, without graph. Those of a device come by one copy, the only one that the host waits for."""
    found = [tensor.detach() for tensor in tensors]
    there = [number for number, tensor in enumerate(found) if tensor.device.type != "cpu"]
    if not there:
        return found
    there.sort(key=lambda number: -found[number].element_size())  # so that each begins where its dtype may
    packed = torch.cat([found[number].reshape(-1).view(torch.uint8) for number in there]).cpu()
    start = 0
    for number in there:
        tensor = found[number]
        found[number], start = _at(packed, start, tensor), start + tensor.nbytes
    return found


class HostBuffer:
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
            self._buffer = _host_memory([self._most, *rows.shape[1:]], rows.dtype, rows.device)
        self._buffer[self._count : self._count + len(rows)].copy_(rows, non_blocking=True)
        self._count += len(rows)
        self._last = rows.flatten()[:1].clone() if rows.numel() else self._last

    @property
    def rows(self) -> Tensor:
        """[n, *] what was added. ValueError if `add` was never called, so that no shape is known."""
        if self._buffer is None:
            raise ValueError(
                "got the rows of a HostBuffer that nothing was added to; expected at least one call of add"
            )
        return self._buffer[: self._count]


def _host_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not set; pinned where a copy to or from `device` would wait otherwise (the meta device copies nothing)."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type not in ("cpu", "meta"))


def _at(packed: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of `packed` from `start` as a tensor like `like`."""
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)
