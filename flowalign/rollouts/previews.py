"""Previews of a rollout: the reward that decides which states are continued, and how well it predicted their samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewards import RewardOutput
from samplers import Forest, Tree, sampled

NAME = "preview"  # in Forest.scores


class Previews:
    """Scores previews for a selection, and remembers the scores.

    judge(groups [n], latents [n, *]) -> scores of one channel."""

    def __init__(self, judge: Callable[[Tensor, Tensor], RewardOutput]) -> None:
        self._judge = judge
        self._known: dict[tuple[int, int], float] = {}  # by (group, local), which a selection does not change

    def score(self, tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
        """[n] the reward; -inf for a preview that cannot be scored."""
        output = self._judge(tree.group[nodes], previews)
        scores = torch.where(output.valid, output.scores, -torch.inf)[:, 0].cpu()
        keys = zip(tree.group[nodes].tolist(), tree.local[nodes].tolist(), strict=True)
        self._known.update(zip(keys, scores.tolist(), strict=True))
        return scores

    def on(self, forest: Forest) -> Forest:
        """The forest with the scores of the previews of its states; nan where there is none."""
        keys = zip(forest.tree.group.tolist(), forest.tree.local.tolist(), strict=True)
        values = torch.tensor([self._known.get(key, torch.nan) for key in keys])
        return forest.with_scores(NAME, torch.where(values.isfinite(), values, torch.nan))


def correlation(forest: Forest, scores: Tensor, valid: Tensor) -> float:
    """Pearson's, over the states that stayed, of the score of the preview and the mean score of the samples below; both
    less their means over the states of one prompt and grid index. nan if nothing differs, or without a preview.

    scores, valid [L]: of tree.leaves. Of "extremes" it is higher than that of all candidates would be: the middle is
    gone."""
    preview = forest.scores.get(NAME, torch.full((len(forest.tree),), torch.nan))
    below = _mean_below(forest.tree, scores, valid)
    nodes = (preview.isfinite() & below.isfinite()).nonzero().flatten()
    sets = torch.stack([forest.tree.group[nodes], forest.tree.index[nodes]], 1).unique(dim=0, return_inverse=True)[1]
    x, y = (_centered(values[nodes].double(), sets) for values in (preview, below))
    spread = float(x.square().sum() * y.square().sum()) ** 0.5
    return float((x * y).sum()) / spread if spread > 0 else float("nan")


def _mean_below(tree: Tree, scores: Tensor, valid: Tensor) -> Tensor:
    """[N] mean score of the valid samples below each node; nan without one."""
    total, count = torch.zeros(len(tree), dtype=torch.float64), torch.zeros(len(tree), dtype=torch.float64)
    ok = (sampled(tree) & valid.cpu()).double()
    total[tree.leaves], count[tree.leaves] = torch.where(ok > 0, scores.cpu().double(), 0.0), ok
    for nodes in reversed(tree.generations[1:]):
        for values in (total, count):
            values.index_add_(0, tree.parent[nodes], values[nodes])
    return total / count


def _centered(values: Tensor, sets: Tensor) -> Tensor:
    """`values` less the mean of their set."""
    number = int(sets.max()) + 1 if len(sets) else 0
    total = torch.zeros(number, dtype=values.dtype).index_add_(0, sets, values)
    return values - (total / sets.bincount(minlength=number))[sets]
