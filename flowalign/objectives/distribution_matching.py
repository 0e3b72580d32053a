"""The terms of distribution matching along a few-step trajectory, and of its surrogate reward (TDM, TDM-R1, DGPO)."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_square(error: Tensor) -> Tensor:
    """⟨e²⟩ [n] over the elements of e [n, *]."""
    return error.square().flatten(1).mean(1)


def pull(x0: Tensor, direction: Tensor, near: Tensor) -> Tensor:
    """⟨(sg(x̂0 + d) − x̂0)²⟩ / sg⟨|x̂0 − y|⟩ [n]: its gradient moves a predicted image x0 [n, *] along the detached
    `direction` d [n, *]; y = near [n, *] (TDM 2503.06674; TDM-R1 2603.07700).

    The value is ⟨d²⟩ over the distance, whatever x̂0: only its gradient −2·d·∂x̂0 over the distance says something. The
    distance is taken in float64, as in the released code: with x̂0 close to y it is a difference of near equals."""
    distance = (x0.detach().double() - near.double()).abs().flatten(1).mean(1)
    return mean_square((x0 + direction).detach() - x0) / distance.to(x0)


def group_gate(gap: Tensor, advantages: Tensor, sets: Tensor, scale: float) -> Tensor:
    """σ(z) [S] of each row's set, z = scale·Σ A·(ℓ_θ − ℓ_ref) over the set (DGPO 2510.08425): half where nothing is learned,
    towards 0 where the set's better samples are already regressed better than by the reference.

    gap = ℓ_θ − ℓ_ref, advantages, sets (numbers from 0): [S] each. scale: β/G. The loss is mean(sg(σ(z))·A·ℓ_θ), whose
    gradient is that of −log σ(−z) over β. As ΣA = 0 in a set, what its samples have in common in ℓ does not matter."""
    z = torch.zeros(int(sets.max()) + 1, dtype=torch.float64).index_add(0, sets, (advantages * gap).double())
    return (scale * z).sigmoid()[sets]


def learns(
    loss: Tensor, old: Tensor, reference: Tensor, distance: Tensor, advantages: Tensor, clip_range: float, limit: float
) -> Tensor:
    """[n] bool: which rows still send a gradient; loss = ℓ_θ, old, reference: regression errors [n] under the three networks.

    A row stops where its ratio exp(ℓ_old − ℓ_θ) has left 1 ± clip_range on the side to which its advantage pushes (the
    ratio of PPO, DGPO 2510.08425), and where it has passed the reference on that side while ⟨(v_θ − v_ref)²⟩ = distance [n]
    is above `limit` (TDM-R1 2603.07700). Our reading: the released code compares the mean distance of a micro-batch, which
    would make the gradient depend on its size."""
    up, ratio = advantages > 0, (old - loss).exp()
    clipped = torch.where(up, ratio > 1 + clip_range, ratio < 1 - clip_range)
    beyond = torch.where(up, loss < reference, loss > reference)
    return ~(clipped | (beyond & (distance > limit)))
