"""Two networks for two ranges of noise: the rows of one call are dealt to them, and their answers put together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.models.conditions import Conditions
from samplers import Rows

# (x [m, *], sigma [m], conditions and negative ones of these rows) -> v [m, *]
Guided = Callable[[Tensor, Tensor, Conditions, Conditions | None], Tensor]


def dealt(
    high: Tensor, above: Guided, below: Guided, x: Tensor, sigma: Tensor, conditions: Conditions,
    negative: Conditions | None,
) -> Tensor:  # fmt: skip
    """v [n, *] in the order of x: `above` answers the rows where high [n], on the host, is True, `below` the others. One that has
    none is not called; one that has all gets them as they are, without a copy."""
    found, numbers = [], []
    for network, chosen in ((above, high), (below, ~high)):
        rows = Rows.beside(x, chosen.nonzero().flatten())
        if len(rows) == len(x):
            return network(x, sigma, conditions, negative)
        if len(rows):
            own, none = conditions.rows(rows.numbers), None if negative is None else negative.rows(rows.numbers)
            found.append(network(rows.of(x), sigma[rows.numbers.to(sigma.device)], own, none))
            numbers.append(rows.numbers)
    v = torch.cat(found)
    return Rows.beside(v, torch.cat(numbers).argsort()).of(v)
