"""Losses of a whole group, one micro-batch at a time (other_trainers §0.6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def scalar_adjoint(values: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂values) of a loss that sees the network only through the scalars `values` [N] (log-probs, errors).

    The first of two passes: `values` need no graph. In the second each micro-batch recomputes its own scalars with a
    graph and returns Σ adjoint·scalar, whose gradients add up to exactly that of the loss, whatever pairs or groups it
    is made of. The memory is that of one micro-batch; the price one forward per state, or none where the scalars are
    known from the rollout."""
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        total = loss(leaf)
        (adjoint,) = torch.autograd.grad(total, leaf)
    return total.detach(), adjoint
