"""A plan whose rollout continues only some of its states: the best, or the best and the worst."""

from dataclasses import dataclass

import numpy as np

from samplers.plans.base import Bounded, most
from samplers.selection import Best, Keep, Score, Select, Within, check_counts, selected_cost, unscored
from samplers.trees import Cost, Tree


@dataclass(frozen=True)
class Selected:
    """`plan` with selection during the rollout: counts = {grid index: how many states of each group are continued
    there}.

    Every candidate at such an index is completed by the ODE to a preview, which is scored and discarded; what trains are
    the samples of the states that stay, with rewards of their own. group_size is the number before selection.
    preview_steps: network steps of a preview, on the sub-grid that a probe takes. 1 jumps to x̂0; the first step shares
    the velocity of the candidate, which is evaluated once, also where the state is continued. 0: no preview, the score
    reads the states themselves, such as finished samples at the last index. keep: "best", or "extremes", half best and
    half worst (Sol-RL 2604.06916: of 96 starts, index 0, with 6 steps the best and worst 12). within: see Best.

    Index 0 compares independent starts, a later one also the children of a shared start. Pass `select(score)` to
    `rollout`. Selected is the outermost plan: put Probed and Compressed inside. Cost: `tree` builds the tree before
    selection in full, so splits multiply its nodes also after a selection; these are rows of numbers, not states.
    Not kept: the law of the samples, which is that of the candidates times the chance to stay; and a preview at index 0
    predicts a sample of the ODE better than one with stochastic steps, whose start does not determine the image.
    """

    plan: Bounded
    counts: dict[int, int]
    within: Within = "group"
    preview_steps: int = 1
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_counts(self.counts, self.within, self.preview_steps, self.keep)

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree, before selection."""
        return self.plan.tree(num_steps, group_size, iteration, rng)

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The cost of the plan's extremes after selection: exact, whichever states stay."""
        trees = self.plan.extremes(num_steps, group_size)
        return most([selected_cost(tree, self._best(unscored)) for tree in trees])

    def select(self, score: Score) -> Select | None:
        """score(tree, nodes, previews) -> [n], the higher the better; -inf for what cannot be scored."""
        return self._best(score)

    def _best(self, score: Score) -> Best:
        return Best(self.counts, score, self.within, self.preview_steps, self.keep)
