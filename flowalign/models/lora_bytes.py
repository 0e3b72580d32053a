"""LoRA files that are a function of their tensors and settings alone, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.storage.files import write_atomic


def ordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA settings with sorted lists for sets, whose order differs between processes."""
    return {name: sorted(value) if isinstance(value, set | frozenset) else value for name, value in settings.items()}


def order_header(path: Path) -> None:
    """Writes a safetensors file again with the keys of its metadata sorted: safetensors gives them another order each time.

    The file's layout: 8 bytes with the length of a JSON object, little-endian, then the object, then the tensors in one
    block, to which the object's offsets refer (https://github.com/huggingface/safetensors#format)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    write_atomic(path, len(text).to_bytes(8, "little") + text + data[8 + length :])
