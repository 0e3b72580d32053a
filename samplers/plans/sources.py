"""Who rolls each sample out: some trajectories of a group are not the student's own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samplers.plans.base import Bounded, select_nothing
from samplers.trees import SOURCES, Cost, Tree


@dataclass(frozen=True)
class Sourced:
    """`plan`, whose last roots are rolled out by the teacher, and those before them by the student with a hint.

    The topology is unchanged; a velocity callback reads tree.source[root] (0 student, 1 hinted, 2 teacher).
    ValueError if no root is left to the student: a plan with a shared start has one root per tree.
    """

    plan: Bounded
    hinted: int = 0
    teacher: int = 0

    def __post_init__(self) -> None:
        if self.hinted < 0 or self.teacher < 0:
            raise ValueError(f"hinted={self.hinted}, teacher={self.teacher} came; expected counts >= 0")

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The plan's tree, marked."""
        return self._marked(self.plan.tree(num_steps, group_size, iteration, rng))

    select = select_nothing

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        """The plan's own."""
        return self.plan.forecast(num_steps, group_size)

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The plan's, marked."""
        return [self._marked(tree) for tree in self.plan.extremes(num_steps, group_size)]

    def _marked(self, tree: Tree) -> Tree:
        own = tree.num_roots - self.hinted - self.teacher
        if own < 1:
            raise ValueError(
                f"hinted={self.hinted}, teacher={self.teacher} came for {tree.num_roots} roots; expected at least one "
                "root for the student: take a larger group, or shared_start=False"
            )
        counts = {"student": own, "hinted": self.hinted, "teacher": self.teacher}
        return tree.with_source(torch.tensor([SOURCES.index(name) for name, n in counts.items() for _ in range(n)]))
