"""Guidance rules that families share. A family's `Model.velocity` may have its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.models.conditions import Conditions


def classifier_free(
    predict: Callable[[Tensor, Tensor, Conditions], Tensor], x: Tensor, sigma: Tensor, conditions: Conditions,
    negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
) -> Tensor:  # fmt: skip
    """v_u + w·(v_c − v_u) (arXiv:2207.12598, eq. 6 with w = 1 + their weight) in fp32, of a network's predictions
    `predict(x [n, *], sigma [n], conditions)`; w = guidance_scale, and 1 is v_c alone, one row per state.

    Both halves are one call, unconditional rows first, as the pipelines of diffusers do. detach_uncond: two calls, the
    unconditional one without gradient: the value is the same to rounding, the gradient is guidance_scale · ∂v_c."""
    if guidance_scale == 1.0:
        return predict(x, sigma, conditions).float()
    negative = needed(negative, guidance_scale)
    if detach_uncond:
        with torch.no_grad():
            unconditional = predict(x, sigma, negative).float()
        conditional = predict(x, sigma, conditions).float()
    else:
        both = predict(torch.cat([x, x]), torch.cat([sigma, sigma]), Conditions.cat([negative, conditions])).float()
        unconditional, conditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def classifier_free_apart(
    predict: Callable[[Tensor, Tensor, Conditions], Tensor], x: Tensor, sigma: Tensor, conditions: Conditions,
    negative: Conditions | None, guidance_scale: float, detach_uncond: bool, *, keep_norm: bool = False,
) -> Tensor:  # fmt: skip
    """The same guidance in two calls, the conditional one first, for networks whose rows of a call share the length of a text.

    keep_norm: scaled to the norm of v_c over the last axis, such as each token's; 0/0 where both are 0."""
    conditional = predict(x, sigma, conditions).float()
    if guidance_scale == 1.0:
        return conditional
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_uncond):
        unconditional = predict(x, sigma, needed(negative, guidance_scale)).float()
    guided = unconditional + guidance_scale * (conditional - unconditional)
    if not keep_norm:
        return guided
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def needed(negative: Conditions | None, guidance_scale: float) -> Conditions:
    if negative is None:
        raise ValueError(
            f"got guidance_scale={guidance_scale} with conditions that have no negative rows; expected those that guidance "
            "starts from: encode(records, negative=True)"
        )
    return negative


def classifier_free_rows(guidance_scale: float) -> int:
    """Network rows that `classifier_free` needs per state."""
    return 1 if guidance_scale == 1.0 else 2
