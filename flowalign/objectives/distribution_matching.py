"""The term by which a few-step generator is moved: distribution matching along its trajectory, and a surrogate reward."""

from __future__ import annotations

from torch import Tensor


def directional_loss(x0: Tensor, direction: Tensor, near: Tensor) -> Tensor:
    """⟨(sg(x̂0 + d) − x̂0)²⟩ / sg⟨|x̂0 − y|⟩ [n]: its gradient moves a predicted image x0 [n, *] along the detached
    `direction` d [n, *]; y = near [n, *] (TDM 2503.06674; TDM-R1 2603.07700).

    The value is ⟨d²⟩ over the distance, whatever x̂0: only its gradient −2·d·∂x̂0 over the distance says something. The
    distance is taken in float64, as in the released code: with x̂0 close to y it is a difference of near equals."""
    distance = (x0.detach().double() - near.double()).abs().flatten(1).mean(1)
    return ((x0 + direction).detach() - x0).square().flatten(1).mean(1) / distance.to(x0)
