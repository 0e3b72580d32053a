"""Losses of a whole group, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def scalar_adjoint(values: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂values) of a loss that sees the network only through the scalars `values` [N] (log-probs, errors).

    The first of two passes: `values` need no graph. In the second pass each micro-batch recomputes its own scalars with a
    graph and returns Σ adjoint·scalar, by the chain rule with exactly the loss's gradient, whatever pairs or groups the
    loss is made of. Memory: that of one micro-batch. Cost: one more forward per state, or none where the scalars are
    known from the rollout."""
    with torch.enable_grad():
        scalars = values.detach().requires_grad_()
        total = loss(scalars)
        (adjoint,) = torch.autograd.grad(total, scalars)
    return total.detach(), adjoint
