"""The mean of several LoRAs as one: of what they change, ΔW = Σ ω·(α/r)·BA, not of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.models.lora_file import LoRAFile


@dataclass(frozen=True, eq=False)
class MergedLoRA:
    """factors: by module (A [k, in], B [out, k]) with k <= rank, such that (alpha/rank)·BA = ΔW. error: the largest
    ‖lost‖/‖ΔW‖ over modules of what the rank does not hold; 0 where it holds all."""

    factors: dict[str, tuple[Tensor, Tensor]]
    error: float


def merge_loras(
    files: Sequence[LoRAFile], rank: int, alpha: float, weights: Sequence[float] | None = None
) -> MergedLoRA:
    """Σ ω·(α/r)·BA of the files, ω by default 1/number, in a LoRA of `rank` and `alpha` (Flow-OPD 2605.08063, the merged start).

    Exact if `rank` is at least the sum of the files' ranks (the ranks are concatenated), else the nearest matrix of that rank
    (singular values). mean(B)·mean(A) would be another matrix: it mixes the factors of different teachers. A module that a file does
    not adapt is 0 there."""
    if not files:
        raise ValueError("got no LoRAs to merge; expected at least one")
    omegas = [1 / len(files)] * len(files) if weights is None else list(weights)
    if len(omegas) != len(files):
        raise ValueError(f"got {len(omegas)} weights for {len(files)} LoRAs; expected one each")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for file, omega in zip(files, omegas, strict=True):
        tensors = file.tensors()
        for module in file.modules:
            a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
            parts.setdefault(module, []).append((a, b * omega * file.alphas[module] / file.ranks[module]))
    factors, errors = {}, [0.0]
    for module, own in parts.items():
        a, b, error = _truncated(torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], 1), rank)
        scale = (rank / alpha) ** 0.5  # shared by both factors, which are equally long
        factors[module] = ((a * scale).float(), (b * scale).float())
        errors.append(error)
    return MergedLoRA(factors, max(errors))


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A' [k, in], B' [out, k], relative error) with B'A' the best approximation of BA of at most `rank`, without forming BA."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    k = min(rank, len(s))
    root = s[:k].sqrt()
    total = float(s.square().sum())
    error = 0.0 if k == len(s) or total == 0 else (float(s[k:].square().sum()) / total) ** 0.5
    return root[:, None] * (v[:k] @ q_a.T), (q_b @ u[:, :k]) * root, error
