"""Which tensor is not finite; the check before weights are saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flowalign.storage.sharded import own


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor holds a NaN or an infinity, None if all are finite; of a sharded one, in this process's shard. Waits
    for each device once."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        by_device.setdefault(tensor.device, []).append((name, own(tensor).detach().isfinite().all()))
    for flags in by_device.values():
        for (name, _), finite in zip(flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True):
            if not finite:
                return name
    return None
