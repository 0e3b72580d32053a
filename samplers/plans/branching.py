"""Trees: samples split at several steps, or branch off a deterministic trunk for one step."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from samplers.plans.base import check_states, costliest, grow, select_nothing
from samplers.plans.positions import Position, Random, Steps, window_end
from samplers.trees import Tree


def branch(num_steps: int, seeds: int, branches: int, steps: Collection[int] | None = None) -> Tree:
    """Deterministic trunks with `branches` one-step stochastic branches at each of `steps`, completed by the ODE.

    TempFlow-GRPO 2508.04324. steps: None stands for all but the last. A trunk ends at its last branching step, since no
    sample uses it further. Network rows: seeds·[(T-1) + branches·T(T-1)/2] for all steps.
    """
    chosen = sorted(range(num_steps - 1) if steps is None else set(steps))
    if num_steps < 1 or seeds < 1 or branches < 1:
        raise ValueError(f"got num_steps={num_steps}, seeds={seeds}, branches={branches}; expected each at least 1")
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_steps:
        raise ValueError(f"got steps {chosen}; expected at least one, inside 0..{num_steps - 1}")
    check_states(seeds * (chosen[-1] + 1 + branches * sum(num_steps - step for step in chosen)))
    parent: list[int] = []
    index: list[int] = []
    level: list[float] = []
    for _ in range(seeds):
        trunk = len(parent)
        parent += [-1, *range(trunk, trunk + chosen[-1])]
        index += range(chosen[-1] + 1)
        level += [0.0] * (chosen[-1] + 1)
        for step in chosen:
            for _ in range(branches):
                length = num_steps - step
                parent += [trunk + step, *range(len(parent), len(parent) + length - 1)]
                index += range(step + 1, num_steps + 1)
                level += [1.0] + [0.0] * (length - 1)
    return Tree.from_parents(parent, index, level, num_steps)


def tree(
    num_steps: int,
    splits: Collection[int] = (0, 3, 6, 9),
    factor: int = 2,
    *,
    levels: Sequence[float] | None = None,
    roots: int = 1,
    train_last: bool = False,
) -> Tree:
    """Each state has `factor` children at the steps of `splits`, one elsewhere: roots·factor^len(splits) leaves.

    BranchGRPO 2509.06040. levels: one per step, 0 = deterministic; None: 1 at every step but the last, which is
    deterministic unless `train_last` (the paper's setting: the noise of its last step is then decoded with the latent,
    and the reward sees it). ValueError for a split at a deterministic step.
    """
    if factor < 2 or len(set(splits)) < len(splits) or any(not 0 <= step < num_steps for step in splits):
        raise ValueError(
            f"got splits={tuple(splits)}, factor={factor}; expected different steps inside 0..{num_steps - 1} and a "
            "factor of at least 2"
        )
    if levels is not None and len(levels) != num_steps:
        raise ValueError(f"got {len(levels)} levels; expected {num_steps}, one per step")
    width = [factor if step in splits else 1 for step in range(num_steps)]
    if levels is None:
        levels = [1.0] * (num_steps - 1) + [float(train_last)]
    return grow(roots, width, levels)


@dataclass(frozen=True)
class Branch:
    """`branch` as a plan (TempFlow-GRPO): group_size = seeds·branches, the images of one branching step.

    count: how many of `candidates` branch, drawn anew in each iteration; None for all. candidates: None stands for all
    steps but the last. An iteration scores group_size·count images.
    """

    branches: int = 6
    count: int | None = None
    candidates: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.branches < 2:
            raise ValueError(f"got branches={self.branches}; expected at least 2: an action is compared with siblings")
        self._steps()

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The trunks and branches of this iteration."""
        return branch(num_steps, self._seeds(group_size), self.branches, self._steps().draw(num_steps, rng))

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """The earliest steps, with each possible last one."""
        sets = self._steps().extremes(num_steps)
        return [branch(num_steps, self._seeds(group_size), self.branches, steps) for steps in sets]

    def _steps(self) -> Steps:
        return Steps(self.candidates, self.count)

    def _seeds(self, group_size: int) -> int:
        return _roots(group_size, self.branches, f"branches={self.branches}")


@dataclass(frozen=True)
class SplitTree:
    """`tree` as a plan (BranchGRPO 2509.06040): group_size leaves, one tree per factor^len(splits) of them.

    window: None makes every step stochastic, the last only if `train_last`; a size makes the splits and a window of
    that many steps stochastic, the others deterministic (BranchGRPO-Mix). The window lies inside low..high-1 and starts
    where `position` says; high None stands for num_steps - 1, position None for Random().
    The paper's setting: splits (0, 3, 6, 9) of 20 steps ("dense"), branch noise with scale 4 (KeyedNoise.branch_scale,
    in a configuration rollout.branch_scale), and train_last=True, with which one tree of 16 leaves has the paper's 218
    stochastic steps. Off by default: the noise of the last step stays on the latent that is decoded and scored.
    """

    splits: tuple[int, ...] = (0, 3, 6, 9)
    factor: int = 2
    train_last: bool = False
    window: int | None = None
    low: int = 0
    high: int | None = None
    position: Position | None = None

    def __post_init__(self) -> None:
        if not self.splits or self.factor < 2:
            raise ValueError(
                f"got SplitTree(splits={self.splits}, factor={self.factor}); expected at least one split and a factor "
                "of at least 2: take Chain for trajectories that do not split"
            )
        if self.window is not None and self.train_last:
            raise ValueError("got SplitTree(window=..., train_last=True); expected train_last only without a window: let the window "
                             "reach the last step with high=num_steps")  # fmt: skip

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The tree of this iteration."""
        if self.window is None:
            return self._with_window(num_steps, group_size, None)
        high = window_end(self.window, self.low, self.high, num_steps)
        start = (self.position or Random()).start(iteration, self.low, high, self.window, rng)
        return self._with_window(num_steps, group_size, start)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """One tree per position of the window."""
        if self.window is None:
            return [self._with_window(num_steps, group_size, None)]
        high = window_end(self.window, self.low, self.high, num_steps)
        starts = (self.position or Random()).starts(self.low, high, self.window)
        return [self._with_window(num_steps, group_size, start) for start in starts]

    def _with_window(self, num_steps: int, group_size: int, start: int | None) -> Tree:
        if start is None or self.window is None:
            stochastic = set(range(num_steps if self.train_last else num_steps - 1))
        else:
            stochastic = {*self.splits, *range(start, start + self.window)}
        roots = _roots(group_size, self.factor ** len(self.splits), f"splits={self.splits}, factor={self.factor}")
        levels = [float(step in stochastic) for step in range(num_steps)]
        return tree(num_steps, self.splits, self.factor, levels=levels, roots=roots)


@dataclass(frozen=True)
class TreeWindow:
    """A tree inside a sliding window: ODE prefix, a split at each of `depth` steps, ODE tails (Dynamic-TreeRPO
    2509.23352).

    The noise level grows linearly with the depth k, 1 + growth·k/(depth-1) times the kernel's own: our reading of the
    paper's eq. 6, whose constants are not published. The window lies inside low..high-1 and starts where `position`
    says; high None stands for num_steps - 1, position None for Random(). group_size leaves, one tree per factor^depth
    of them. Network rows of one binary tree: l + (2^d - 1) + 2^d·(T-l-d), for a window that starts at step l.
    """

    depth: int = 4
    factor: int = 2
    growth: float = 0.5
    low: int = 0
    high: int | None = None
    position: Position | None = None

    def __post_init__(self) -> None:
        if self.depth < 1 or self.factor < 2 or self.growth <= -1:
            raise ValueError(f"got {self}; expected depth >= 1, factor >= 2 and growth > -1")

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        """The tree at this iteration's window."""
        high = window_end(self.depth, self.low, self.high, num_steps)
        start = (self.position or Random()).start(iteration, self.low, high, self.depth, rng)
        return self._at(start, num_steps, group_size)

    forecast = costliest
    select = select_nothing

    def extremes(self, num_steps: int, group_size: int) -> Sequence[Tree]:
        """One tree per position of the window."""
        high = window_end(self.depth, self.low, self.high, num_steps)
        starts = (self.position or Random()).starts(self.low, high, self.depth)
        return [self._at(start, num_steps, group_size) for start in starts]

    def _at(self, start: int, num_steps: int, group_size: int) -> Tree:
        roots = _roots(group_size, self.factor**self.depth, f"depth={self.depth}, factor={self.factor}")
        levels = [0.0] * num_steps
        for k in range(self.depth):
            levels[start + k] = 1.0 + self.growth * k / max(self.depth - 1, 1)
        return tree(num_steps, range(start, start + self.depth), self.factor, levels=levels, roots=roots)


def _roots(group_size: int, leaves: int, settings: str) -> int:
    """How many trees of `leaves` leaves make a group; `settings` names what decides `leaves`, for the error."""
    if group_size < 1 or group_size % leaves:
        raise ValueError(
            f"got group_size={group_size} with {settings}; expected a multiple of {leaves}, the images that grow from one "
            "initial noise"
        )
    return group_size // leaves
