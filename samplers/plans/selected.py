"""A plan whose rollout continues only the best states."""

from dataclasses import dataclass

import numpy as np

from samplers.plans.base import Bounded, most
from samplers.selection import Best, Score, Select, Within, check_counts, selected_cost
from samplers.trees import Cost, Tree


@dataclass(frozen=True)
class Selected:
    """`plan` with selection during the rollout: counts = {grid index: how many states of each group are continued
    there}.

    uses_velocity: the score reads the velocities of all candidates (for their predicted x̂0); the forecast counts them.
    within: see Best. Pass `select(score)` to `rollout`. Selected is the outermost plan: put Probed and Compressed
    inside. Cost: `tree` builds the tree before selection in full, so splits multiply its nodes also after a selection;
    these are rows of numbers, not states.
    """

    plan: Bounded
    counts: dict[int, int]
    within: Within = "group"
    uses_velocity: bool = True

    def __post_init__(self) -> None:
        check_counts(self.counts, self.within)

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree, before selection."""
        return self.plan.tree(num_steps, group_size, iteration, rng)

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The cost of the plan's extremes after selection: exact, whichever states stay."""
        trees = self.plan.extremes(num_steps, group_size)
        costs = [selected_cost(tree, self.counts, self.within, uses_velocity=self.uses_velocity) for tree in trees]
        return most(costs)

    def select(self, score: Score) -> Select | None:
        """score(tree, nodes, states, velocities) -> [n], the higher the better."""
        return Best(self.counts, score, self.within, self.uses_velocity)
