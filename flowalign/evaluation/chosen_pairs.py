"""Which pairs of images are shown: those that gained most, those that lost most, and some by chance, which show neither side."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from samplers import generator

GAINS, LOSSES, CHANCE = "largest gains", "largest losses", "drawn by chance"


def chosen_pairs(base: Tensor, tuned: Tensor, *, each: int = 4, seed: int = 0) -> dict[str, list[int]]:
    """{what it shows: rows, at most `each`} of scores base and tuned [N] of pairs, nan = not valid.

    Gains are above 0 and losses below, largest first, equal ones in their order; an empty list if there is none. Those by
    chance are drawn from all pairs, keyed by the seed, also invalid ones and such as are shown already."""
    difference = (tuned.double() - base.double()).numpy()
    order = np.argsort(-difference, kind="stable")  # nan last, and nan > 0 is false
    ups = [int(row) for row in order if difference[row] > 0]
    downs = [int(row) for row in np.argsort(difference, kind="stable") if difference[row] < 0]
    drawn = generator(seed, "select", "chosen_pairs").permutation(len(difference))[:each]
    return {GAINS: ups[:each], LOSSES: downs[:each], CHANCE: sorted(int(row) for row in drawn)}
