"""Which network rolls each sample out: a teacher or a hinted student may give some of a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from samplers.plans.base import Bounded, select_nothing
from samplers.trees import SOURCES, Cost, Tree


@dataclass(frozen=True)
class Sourced:
    """`plan` whose last `teacher` roots are rolled out by the teacher, and the `hinted` before them by a hinted
    student.

    The topology is unchanged; a velocity callback reads tree.source[root] (0 student, 1 hinted, 2 teacher).
    ValueError if no root is left to the student: a plan with a shared start has one root per tree.
    """

    plan: Bounded
    hinted: int = 0
    teacher: int = 0

    def __post_init__(self) -> None:
        if self.hinted < 0 or self.teacher < 0:
            raise ValueError(f"got hinted={self.hinted}, teacher={self.teacher}; expected counts >= 0")

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
                f"got hinted={self.hinted}, teacher={self.teacher} for {tree.num_roots} roots; expected at least one "
                "root for the student: take a larger group, or shared_start=False"
            )
        counts = {"student": own, "hinted": self.hinted, "teacher": self.teacher}
        return tree.with_source(torch.tensor([SOURCES.index(name) for name, n in counts.items() for _ in range(n)]))
