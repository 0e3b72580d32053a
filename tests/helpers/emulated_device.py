"""An accelerator emulated on the CPU, which shows without one what would make a GPU wait.

Its tensors say that they are on `DEVICE` and are computed by the CPU's own kernels, so all numbers are the CPU's. As CUDA does,
it refuses operations on tensors of two devices, numpy, and indices of the host's tensors that are on the device. It keeps an
`Event`, with the lines of ours that led to it, for each copy between host and device and for whatever else lets the host wait
for the device: a number that is read (`float`, `bool`, `.item()`), a result whose size depends on values (`nonzero`, a boolean
mask as an index, `unique`), `torch.equal`, and every copy but one out of pinned memory with non_blocking=True. It counts the
bytes of the storages that live on it.

Not kept: time, streams, the memory of a kernel's own workspace, float arithmetic of another device.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)  # "emulated:0" once there is an EmulatedDevice

PROJECT = Path(__file__).parents[2]
READS = {"_local_scalar_dense", "equal", "is_nonzero"}  # a value of the host's comes out
SIZED_BY_VALUES = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
WAITING = READS | SIZED_BY_VALUES
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}


@dataclass(frozen=True)
class Event:
    """A copy ("to device", "to host") of `nbytes`, or another operation for which the host waits ("wait").

    waits: whether the host waits for the device. stack: the lines of the project that led there, the innermost first, as
    "file:line function"; empty in a backward without recomputation. phase: see `EmulatedDevice.phase`."""

    kind: str
    op: str
    nbytes: int
    waits: bool
    stack: tuple[str, ...]
    phase: str

    @property
    def site(self) -> str:
        return self.stack[0] if self.stack else "backward"

    def inside(self, *places: str) -> bool:
        """Whether one of `places`, such as "samplers/rollout.py", led to it."""
        return any(line.startswith(place) for line in self.stack for place in places)


class OnDevice(Tensor):
    """A tensor of the device. `data_on_cpu`: its numbers."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            layout=data.layout, device=DEVICE,
        )  # fmt: skip
        made.data_on_cpu = data
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """For nn.Module.to, which swaps parameters of such classes."""
        return ["data_on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> OnDevice:
        return OnDevice(inner["data_on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current(func).run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        """`weight.data = values`, as roles and adapters are filled: torch would change what it wraps only."""
        self.data_on_cpu = values.data_on_cpu if isinstance(values, OnDevice) else values

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()


class EmulatedDevice(TorchDispatchMode):
    """The device, as a context; what is done with its tensors is done inside. events: in their order. live, peak: bytes."""

    current: EmulatedDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        _backend()
        self.events: list[Event] = []
        self.live = self.peak = 0
        self._phase = ""
        self._storages: dict[int, Any] = {}
        self._pinned = weakref.WeakSet[Any]()

    def __enter__(self) -> EmulatedDevice:
        EmulatedDevice.current = self
        self._one_thread = torch.autograd.set_multithreading_enabled(False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        EmulatedDevice.current = None
        self._one_thread.__exit__(*error)
        super().__exit__(*error)

    # ------------------------------------------------------------------------------------------ what was seen

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Events inside belong to the phase `name`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def seen(self, phase: str | None = None) -> list[Event]:
        """The events of a phase; None: all."""
        return [event for event in self.events if phase in (None, event.phase)]

    def table(self, events: list[Event] | None = None) -> str:
        """Events counted by phase, kind and line, the most frequent first."""
        rows = self.events if events is None else events
        counted = Counter((e.phase, "waits" if e.waits else "", e.kind, e.op, e.site) for e in rows)
        size: Counter[Any] = Counter()
        for e in rows:
            size[(e.phase, "waits" if e.waits else "", e.kind, e.op, e.site)] += e.nbytes
        return "\n".join(
            f"{count:5d}  {phase:10s} {waits:5s} {kind:9s} {op:22s} {size[key]:9d} B  {site}"
            for key, count in counted.most_common()
            for phase, waits, kind, op, site in [key]
        )

    # ------------------------------------------------------------------------------------------ what it does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation of torch."""
        name, in_place = _name(func)
        tensors: list[Tensor] = []
        _list_tensors(args, tensors)
        _list_tensors(kwargs, tensors)
        host = [tensor for tensor in tensors if type(tensor) is not OnDevice]
        asked = kwargs.get("device")
        if len(host) == len(tensors) and (asked is None or torch.device(asked).type != DEVICE.type):
            return self._on_host(func, args, kwargs)
        if name in COPIES:
            return self._copied(func, name, args, kwargs)
        if name in INDEXED:
            self._check_index(name, args)
        elif host and not name.startswith("new_") and any(tensor.ndim for tensor in host):
            shape = next(list(tensor.shape) for tensor in host if tensor.ndim)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! ({name}: {shape} "
                "of the host)"
            )
        if name in WAITING:
            self._event("wait", name, 0, True)
        found = func(*_data(args), **_on_cpu(_data(kwargs)))
        if name in READS:
            return found
        if in_place:
            return args[0]
        return kwargs["out"] if "out" in kwargs else self._wrapped(found)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Without the device; remembers what is pinned, which a CPU alone cannot do."""
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "pin_memory": False})
        self._pinned.add(made.untyped_storage())
        return made

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A copy, between host and device or inside one of them."""
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        here, there = isinstance(source, OnDevice), target.type == DEVICE.type
        if here != there and source.numel():
            asked = bool(kwargs.get("non_blocking")) or args[2:3] == (True,)
            host = source if there else args[0] if name == "copy_" else None
            waits = not (asked and host is not None and host.untyped_storage() in self._pinned)
            kind = "to device" if there else "to host"
            self._event(kind, name, source.numel() * source.element_size(), waits)
        found = func(*_data(args), **_on_cpu({**_data(kwargs), "non_blocking": False}))
        if name == "copy_":
            return args[0]
        return self._wrapped(found) if there else found

    def _check_index(self, name: str, args: Any) -> None:
        """RuntimeError as CUDA's for indices on the wrong device. A mask lets the host wait, an index of the host is copied."""
        indices = [index for index in args[1] if index is not None]
        here = isinstance(args[0], OnDevice)
        for index in indices:
            if isinstance(index, OnDevice) and not here:
                raise RuntimeError(
                    f"indices should be either on cpu or on the same device as the indexed tensor (cpu): {name}"
                )
            if here and index.dtype in (torch.bool, torch.uint8):
                self._event("wait", f"{name} by a mask", 0, True)
            elif here and not isinstance(index, OnDevice):
                self._event("to device", f"{name} by an index of the host", index.numel() * index.element_size(), True)
        if here and name != "index" and len(args) > 2 and not isinstance(args[2], OnDevice) and args[2].ndim:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu! ({name})")

    def _wrapped(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._wrapped(each) for each in value)
        if not isinstance(value, Tensor) or type(value) is OnDevice:
            return value
        self._count(value.untyped_storage())
        return OnDevice(value)

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Counts the bytes of a storage for as long as it lives."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(reference: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _event(self, kind: str, op: str, nbytes: int, waits: bool) -> None:
        self.events.append(Event(kind, op, nbytes, waits, _lines(), self._phase))


def _made_by_tensor(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:  # fmt: skip
    """`torch.tensor(numbers, device=DEVICE)` makes a tensor of the device where no mode sees it, …"""
    return _current("torch.tensor")._wrapped(torch.empty_strided(size, stride, dtype=dtype))


def _filled_by_tensor(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """… and copies its numbers from the host."""
    _current("torch.tensor")._event("to device", "tensor", source.nbytes, True)
    target.data_on_cpu.copy_(source)
    return target


class _Module(_DummyBackendModule):
    """What torch asks of torch.<device>; for a checkpoint's recomputation also which autocast it has."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def _backend() -> torch.library.Library:
    """torch's backend for the device, once per process, since torch cannot take it back. The first backward of a process starts
    a thread for each device there is then; this one needs none, since a backward stays in its own thread."""
    torch.zeros((), requires_grad=True).backward()
    _setup_privateuseone_for_python_backend("emulated", _Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _made_by_tensor, "PrivateUse1")
    library.impl("_copy_from", _filled_by_tensor, "PrivateUse1")
    return library


def _current(func: Any) -> EmulatedDevice:
    if EmulatedDevice.current is None:
        raise RuntimeError(f"got {func} on the emulated device outside `with EmulatedDevice()`")
    return EmulatedDevice.current


@cache
def _name(func: Any) -> tuple[str, bool]:
    """The name of an operation, and whether it works in place."""
    name = func.overloadpacket.__name__
    return name, func._schema.is_mutable and name.endswith("_")


def _list_tensors(values: Any, found: list[Tensor]) -> None:
    """Adds the tensors in nested arguments to `found`."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _list_tensors(value, found)


def _data(values: Any) -> Any:
    """Nested arguments with the numbers of tensors of the device in their place."""
    if type(values) is OnDevice:
        return values.data_on_cpu
    if isinstance(values, dict):
        return {name: _data(value) for name, value in values.items()}
    return type(values)(_data(value) for value in values) if type(values) in (tuple, list) else values


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    device = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
    return {name: value for name, value in (kwargs | device).items() if name != "non_blocking" or value}


def _lines() -> tuple[str, ...]:
    """The lines of the project on the stack, the innermost first, without those of this file."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(PROJECT)) and ".venv" not in file and file != __file__:
            found.append(f"{file[len(str(PROJECT)) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found)
