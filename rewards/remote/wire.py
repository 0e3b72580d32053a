"""The one form in which a RewardBatch and a RewardOutput leave a process, to a worker or over HTTP: bytes, never pickles.

A message has the layout of a safetensors file: 8 bytes with the length of a JSON header (little endian), the header, then the
tensors' raw bytes, one after the other without gaps. `__metadata__` holds the protocol, the kind ("batch" or "output")
and, as JSON text, what is no tensor. Bits are kept: pictures go as uint8 where float32 k/255 says the same, else as they are.
It is read here and not by the safetensors package so that everything declared is checked before anything is allocated,
and so that a worker's environment needs torch and numpy only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput

PROTOCOL = "flowalign-reward/1"
MEDIA_TYPE = "application/vnd.flowalign-reward"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WireError(ValueError):
    """Bytes that are no message of this protocol, or a value that cannot be one."""


class TooLarge(WireError):
    """A message above a limit; half of its samples may fit."""


@dataclass(frozen=True)
class Limits:
    """What a receiver takes: bytes of a message and of its header (prompts, metadata), samples, pixels of one picture."""

    total_bytes: int = 2**29
    header_bytes: int = 2**24
    samples: int = 1024
    pixels: int = 2**24


UNLIMITED = Limits(2**62, 2**62, 2**62, 2**62)  # between a process and a worker that it started


@dataclass(frozen=True)
class _Entry:
    """A tensor that a header declares: start and end count bytes from the start of the message."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def encode_batch(batch: RewardBatch) -> bytes:
    """WireError for metadata that JSON does not give back as it was (tuples come back as lists)."""
    tensors = {name: tensor for name, tensor in batch.tensors().items() if tensor is not None}
    for name in ("images", "videos"):
        if name in tensors:
            tensors[name] = _compact(tensors[name])
    for i, images in enumerate(batch.conditions or []):
        tensors |= {f"conditions.{i}.{j}": _compact(image) for j, image in enumerate(images)}
    content = {
        "prompts": batch.prompts,
        "metadata": [_plain(row, f"metadata[{i}]") for i, row in enumerate(batch.metadata)],
        "sample_ids": batch.sample_ids,
        "group_ids": batch.group_ids,
        "fps": batch.fps,
        "conditions": None if batch.conditions is None else [len(images) for images in batch.conditions],
    }
    return _encode("batch", content, tensors)


def decode_batch(data: bytes, limits: Limits | None = None) -> RewardBatch:
    """WireError for what is no batch; TooLarge above a limit, before a tensor is made."""
    limits = limits or Limits()
    content, entries = _read(data, "batch", limits)
    prompts, counts = _list(content, "prompts", str), content.get("conditions")
    counts = None if counts is None else _list(content, "conditions", int)
    conditions = [[f"conditions.{i}.{j}" for j in range(min(n, len(entries)))] for i, n in enumerate(counts or [])]
    fields = [name for name in ("images", "videos", "latents", "sigma") if name in entries]
    if sorted(entries) != sorted([*fields, *(name for names in conditions for name in names)]):
        raise WireError(
            f"got the tensors {sorted(entries)[:8]}; expected fields of a batch and the declared conditions"
        )
    if len(prompts) > limits.samples:
        raise TooLarge(f"got {len(prompts)} samples; expected at most {limits.samples}")
    for name, entry in entries.items():
        if name not in ("latents", "sigma") and math.prod(entry.shape[-2:]) > limits.pixels:
            raise TooLarge(f"got {name} {list(entry.shape)}; expected at most {limits.pixels} pixels a picture")
    tensors = {name: _tensor(data, entry) for name, entry in entries.items()}
    fps = content.get("fps")
    if fps is not None and not isinstance(fps, int | float):
        raise WireError(f"got fps={fps!r}; expected a number or null")
    try:
        return RewardBatch(
            prompts=prompts, metadata=_list(content, "metadata", dict), sample_ids=_list(content, "sample_ids", int),
            group_ids=_list(content, "group_ids", int), fps=fps, **{name: tensors[name] for name in fields},
            conditions=None if counts is None else [[tensors[name] for name in names] for names in conditions],
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise WireError(str(error)) from error


def encode_output(output: RewardOutput) -> bytes:
    """Scores, valid, components, uncertainty, info, channels; not `elapsed`, which the caller measures."""
    content = {
        "rows": list(range(len(output.scores))),
        "info": list(output.info),
        "channels": list(output.channels),
        "components": list(output.components),
    }
    tensors = {"scores": output.scores, "valid": output.valid}
    tensors |= {f"components.{i}": part for i, part in enumerate(output.components.values())}
    return _encode(
        "output", content, tensors | ({} if output.uncertainty is None else {"uncertainty": output.uncertainty})
    )


def decode_output(data: bytes, count: int, limits: Limits | None = None) -> RewardOutput:
    """The output on `count` samples, in their order, whatever the order in which they come (`rows`).

    WireError if it is of another number of samples, or if a row is missing or there twice."""
    content, entries = _read(data, "output", limits or Limits())
    rows, names, info = _list(content, "rows", int), _list(content, "components", str), _list(content, "info", str)
    lengths = {len(rows), *(entry.shape[0] if entry.shape else -1 for entry in entries.values())}
    if info:
        lengths.add(len(info))
    if lengths != {count} or sorted(rows) != list(range(count)):
        raise WireError(
            f"got an answer on {sorted(lengths)} samples, rows {rows[:8]}; expected {count}, each row once: not used"
        )
    expected = {"scores", "valid", *(f"components.{i}" for i in range(len(names)))}
    if set(entries) - {"uncertainty"} != expected:
        raise WireError(f"got the tensors {sorted(entries)[:8]}; expected {sorted(expected)}")
    order = sorted(range(count), key=rows.__getitem__)
    tensors = {name: _tensor(data, entry)[order] for name, entry in entries.items()}
    return RewardOutput(
        tensors["scores"], tensors["valid"], {name: tensors[f"components.{i}"] for i, name in enumerate(names)},
        [info[row] for row in order] if info else [], uncertainty=tensors.get("uncertainty"),
        channels=tuple(_list(content, "channels", str)),
    )  # fmt: skip


def _encode(kind: str, content: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    parts, header, start = [], {}, 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        parts.append(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        header[name] = {
            "dtype": NAMES[flat.dtype],
            "shape": list(flat.shape),
            "data_offsets": [start, start + len(parts[-1])],
        }
        start += len(parts[-1])
    metadata = {"protocol": PROTOCOL, "kind": kind, "content": json.dumps(content, allow_nan=False)}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _read(data: bytes, kind: str, limits: Limits) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """What is no tensor, and the tensors that are declared, checked against the bytes that are there."""
    if len(data) > limits.total_bytes:
        raise TooLarge(f"got {len(data)} bytes; expected at most {limits.total_bytes}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise WireError(
            f"got {len(data)} bytes without the header that they announce; expected a message of {PROTOCOL}"
        )
    if length > limits.header_bytes:
        raise TooLarge(f"got a header of {length} bytes; expected at most {limits.header_bytes}")
    header = _json(data[8 : 8 + length], "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("protocol") != PROTOCOL or metadata.get("kind") != kind:
        got = (metadata.get("protocol"), metadata.get("kind")) if isinstance(metadata, dict) else None
        raise WireError(f"got a message of {got}; expected {(PROTOCOL, kind)}: take one version on both sides")
    entries, start = {}, 8 + length
    for name, form in header.items():
        entries[name] = _entry(name, form, start, 8 + length)
        start = entries[name].end
    if start != len(data):
        raise WireError(f"got {len(data)} bytes; expected {start}, the header and the tensors that it declares")
    return _json(metadata.get("content"), "content"), entries


def _json(text: Any, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(
            f"got a {what} that is no JSON ({type(error).__name__}); expected a message of {PROTOCOL}"
        ) from error
    if not isinstance(value, dict):
        raise WireError(f"got a {what} of type {type(value).__name__}; expected an object")
    return value


def _entry(name: str, form: Any, start: int, first: int) -> _Entry:
    """The tensor `name`, which has to begin at `start`; offsets count from `first`."""
    dtype = DTYPES.get(str(form.get("dtype"))) if isinstance(form, dict) else None
    shape = form.get("shape") if isinstance(form, dict) else None
    if dtype is None or not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise WireError(f"got tensor {name!r} as {str(form)[:200]}; expected a shape and one of {', '.join(DTYPES)}")
    end = start + math.prod(shape) * dtype.itemsize
    if len(shape) > 8 or form.get("data_offsets") != [start - first, end - first]:
        raise WireError(
            f"got tensor {name!r} as {str(form)[:200]}; expected the bytes {start - first} to {end - first}"
        )
    return _Entry(dtype, tuple(shape), start, end)


def _tensor(data: bytes, entry: _Entry) -> Tensor:
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    own = bytearray(memoryview(data)[entry.start : entry.end])  # aligned, and may be written to
    if entry.dtype == torch.bool and max(own) > 1:
        raise WireError("got a bool that is neither 0 nor 1")
    return torch.frombuffer(own, dtype=entry.dtype).reshape(entry.shape)


def _compact(pixels: Tensor) -> Tensor:
    """uint8, if a RewardBatch makes the same float32 bits of it (k/255), else as it is."""
    pixels = pixels.detach().cpu().contiguous()
    if pixels.dtype != torch.float32:
        return pixels
    rounded = (pixels * 255).round().clamp(0, 255).nan_to_num().to(torch.uint8)
    same = torch.equal((rounded.float() / 255).view(torch.int32), pixels.view(torch.int32))
    return rounded if same else pixels


def _plain(value: Any, where: str) -> Any:
    """`value`, if JSON keeps it."""
    if value is None or isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(each, f"{where}[{key!r}]") for key, each in value.items()}
    raise WireError(
        f"got {where}={str(value)[:80]} ({type(value).__name__}); expected texts, finite numbers, bools, null, and lists "
        "and mappings of them with texts as keys: nothing else leaves the process"
    )


def _list(content: dict[str, Any], name: str, kind: type) -> list[Any]:
    values = content.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise WireError(f"got {name}={str(values)[:80]}; expected a list of {kind.__name__}")
    return values
