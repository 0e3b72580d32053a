"""The paired gain: base and tuned model compared image by image, on the same prompts and from the same noise.

Most of the variance between prompts cancels in the difference of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowalign.evaluation.evaluate import EvaluationResult
from samplers import generator


@dataclass(frozen=True)
class PairedGain:
    """tuned − base: the means `base` and `tuned` over the valid pairs, `mean` their difference, and its 95 % interval
    (low, high), which is None with fewer than two prompts.

    `pairs` were compared, of which `wins` gained and `losses` lost; `dropped` had an invalid score, the base's image in
    `unscored_base` of them, the tuned one in `unscored_tuned`. Not kept: where scores are missing for a reason, the pairs that
    are left are no fair sample."""

    mean: float
    interval: tuple[float, float] | None
    base: float
    tuned: float
    pairs: int
    wins: int
    losses: int
    dropped: int
    unscored_base: int
    unscored_tuned: int

    @property
    def ties(self) -> int:
        """Pairs of equal scores."""
        return self.pairs - self.wins - self.losses


def paired_gain(
    base: Tensor, tuned: Tensor, clusters: Sequence[int] | None = None, *, seed: int = 0, resamples: int = 10_000
) -> PairedGain:
    """The mean of tuned − base [N] and its 95 % percentile-bootstrap interval (Efron 1979).

    Clusters (prompt uids) are drawn with replacement, not samples: several seeds of one prompt are not independent.
    Without `clusters` each sample is a cluster. A pair with a nan on either side is dropped and counted. The draws are
    keyed: the same scores give the same interval. Not kept: below about 20 clusters the interval is too narrow.
    ValueError for scores that do not pair, or if no pair is valid."""
    if base.shape != tuned.shape or base.ndim != 1:
        raise ValueError(
            f"got scores of shapes {list(base.shape)} and {list(tuned.shape)}; expected two [N] of equal N"
        )
    labels = np.arange(len(base)) if clusters is None else np.asarray(clusters)
    if len(labels) != len(base):
        raise ValueError(f"got {len(labels)} cluster labels for {len(base)} scores; expected one each")
    before, after = base.double().numpy(), tuned.double().numpy()
    missing = np.isnan(before), np.isnan(after)
    valid = ~(missing[0] | missing[1])
    if not valid.any():
        raise ValueError(f"none of {len(base)} pairs has two valid scores; expected at least one: check the reward")
    before, after, labels = before[valid], after[valid], labels[valid]
    _, codes = np.unique(labels, return_inverse=True)
    draws = _bootstrap_means(np.bincount(codes, after - before), np.bincount(codes), seed, resamples)
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    mean_before, mean_after = float(before.mean()), float(after.mean())
    return PairedGain(
        mean=mean_after - mean_before,
        interval=(low, high) if codes.max() > 0 else None,
        base=mean_before,
        tuned=mean_after,
        pairs=len(before),
        wins=int((after > before).sum()),
        losses=int((after < before).sum()),
        dropped=int((~valid).sum()),
        unscored_base=int(missing[0].sum()),
        unscored_tuned=int(missing[1].sum()),
    )


def _bootstrap_means(sums: np.ndarray, counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of `resamples` draws of as many clusters as there are; sums and counts [C] per cluster."""
    rng = generator(seed, "select", "paired_gain")
    clusters = len(sums)
    means = []
    for first in range(0, resamples, 500):  # in parts: 500·C numbers at a time
        times = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=min(500, resamples - first))
        means.append(times @ sums / (times @ counts))
    return np.concatenate(means)


def direction(interval: Sequence[float]) -> str:
    """In words, of a gain's interval (low, high)."""
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "no clear change"


def paired_gains(base: EvaluationResult, tuned: EvaluationResult) -> dict[str, PairedGain]:
    """The gain per reward. ValueError unless both saw the same prompts, samples, seed and rewards."""
    for what, ours, other in (
        ("prompts", base.uids, tuned.uids),
        ("seed", base.seed, tuned.seed),
        ("rewards", sorted(base.scores), sorted(tuned.scores)),
    ):
        if ours != other:
            raise ValueError(
                f"base and tuned differ in {what}: got {ours} and {other}; expected equal ones: evaluate both alike"
            )
    return {name: paired_gain(base.scores[name], tuned.scores[name], base.uids) for name in base.scores}
