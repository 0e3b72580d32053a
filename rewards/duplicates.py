"""Samples that are equal in all that a reward may read, so that one score serves all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import RewardBatch


def first_of_equals(batch: RewardBatch) -> Tensor:
    """[N]: the number of the first sample that equals each one in pixels, latents, sigma, prompt, metadata and conditions;
    of samples without pixels and latents none equals another."""
    tensors = [tensor.detach() for tensor in batch.tensors().values() if tensor is not None]
    if not tensors:
        return torch.arange(len(batch))
    # equal samples have equal sums; only samples with equal sums are compared
    sums = [tensor[:, None].flatten(1).sum(1, dtype=torch.float64).tolist() for tensor in tensors]
    firsts: dict[tuple[object, ...], list[int]] = {}
    found = []
    for row in range(len(batch)):
        candidates = firsts.setdefault((batch.prompts[row], *(each[row] for each in sums)), [])
        first = next((other for other in candidates if _equal(batch, tensors, other, row)), row)
        if first == row:
            candidates.append(row)
        found.append(first)
    return torch.tensor(found, dtype=torch.long)


def _equal(batch: RewardBatch, tensors: list[Tensor], one: int, other: int) -> bool:
    sources = batch.conditions or [[]] * len(batch)
    try:
        same = bool(batch.metadata[one] == batch.metadata[other])
    except (ValueError, RuntimeError):  # arrays have no single truth
        return False
    return (
        same
        and all(torch.equal(tensor[one], tensor[other]) for tensor in tensors)
        and len(sources[one]) == len(sources[other])
        and all(torch.equal(a, b) for a, b in zip(sources[one], sources[other], strict=True))
    )
