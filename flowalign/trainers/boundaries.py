"""The states of deterministic trajectories between two steps, and the same states noised again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.rollouts.collect import ScoredRollout
from flowalign.trainers.update_engine import States
from samplers import Forest, Held, Path, SampleKeys, ShiftedUniform, generator
from samplers.kernels.base import spread


@dataclass(frozen=True, eq=False)
class Boundaries:
    """N trajectories of K steps, those of the samples of a rollout without noise.

    Every method takes M steps and returns S = M·N rows: the N trajectories at the first of the steps, then all of them at the
    second, and so on; of what has a latent's size, the k where `here` [S] (None: all). nodes [N, K+1]: the forest's states on
    each trajectory, from noise to data. keys: of the samples, from which noise and noise levels are drawn. shift, margin: of the
    noise levels, see ShiftedUniform."""

    forest: Forest
    keys: SampleKeys
    path: Path
    nodes: Tensor
    shift: float
    margin: float

    @staticmethod
    def of(batch: ScoredRollout, seed: int, path: Path, shift: float, margin: float) -> Boundaries:
        """Of a rollout whose states are all stored."""
        tree = batch.forest.tree
        keys, nodes = SampleKeys.of(seed, batch.iteration, tree, tree.leaves, batch.uids), [tree.leaves]
        for _ in range(tree.num_steps):
            nodes.append(tree.parent[nodes[-1]])
        return Boundaries(batch.forest, keys, path, torch.stack(nodes[::-1], 1), shift, margin)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def num_steps(self) -> int:
        """K."""
        return self.nodes.shape[1] - 1

    @property
    def group(self) -> Tensor:
        """[N] of each trajectory."""
        return self.forest.tree.group[self.nodes[:, 0]]

    def random_steps(self, count: int) -> list[int]:
        """`count` different steps; key (seed, "boundary", iteration)."""
        rng = generator(self.keys.seed, "boundary", self.keys.iteration)
        return [int(step) for step in rng.permutation(self.num_steps)[:count]]

    def late_steps(self, count: int, number: int) -> list[int]:
        """`count` steps, repeats allowed, step j in proportion to j + 1; key (seed, "late_boundary", iteration, number)."""
        rng = generator(self.keys.seed, "late_boundary", self.keys.iteration, number)
        total = sum(range(self.num_steps + 1))
        share = [(step + 1) / total for step in range(self.num_steps)]
        return [int(step) for step in rng.choice(self.num_steps, count, p=share)]

    def states(self, steps: Sequence[int], here: Tensor | None = None) -> States:
        """What the generator was given in `steps` [S]."""
        nodes, here = self._nodes(steps, 0), self._all(steps) if here is None else here
        x = Held.of(self.forest.at(nodes[here]), here)
        return States(x.values, self.forest.sigma(nodes), self.forest.tree.group[nodes], x.row)

    def predictions(self, steps: Sequence[int], here: Tensor | None = None) -> Tensor:
        """x̂0 [k, *] = x − σ·v that the generator predicted there: v = (x − x')/h of Euler's step x' = x − h·v."""
        here = self._all(steps) if here is None else here
        before, after = self._nodes(steps, 0)[here], self._nodes(steps, 1)[here]
        x, sigma = self.forest.at(before), self.forest.sigma(before)
        velocity = (x - self.forest.at(after)) / spread((sigma - self.forest.sigma(after)).to(x), x)
        return self.path.x0_from_velocity(x, velocity, sigma)

    def levels(self, steps: Sequence[int], stream: str, low: float, *, shared: bool) -> Tensor:
        """[S] noise levels above the end of each step, and above `low`; stream "sigma <stream> <place>". shared: one for all
        samples of a group."""
        keys, grid, found = self.keys.shared() if shared else self.keys, self.forest.sigmas, []
        for place, step in enumerate(steps):
            law = ShiftedUniform(max(float(grid[step + 1]), low), self.shift, self.margin)
            found.append(keys.sigmas(law, 1, grid, self.path, f"sigma {stream} {place}")[:, 0])
        return torch.cat(found)

    def noised(
        self, steps: Sequence[int], sigma: Tensor, stream: str, here: Tensor | None = None, *, shared: bool
    ) -> tuple[States, Tensor]:
        """The ends of `steps` noised again up to `sigma` [S] (`Path.bridge`), and the targets [k, *] whose mean is their exact
        velocity; stream "bridge <stream>". shared: by one noise for all samples of a group."""
        keys, nodes = self.keys.shared() if shared else self.keys, self._nodes(steps, 1)
        here = self._all(steps) if here is None else here
        x, begin, level = self.forest.at(nodes[here]), self.forest.sigma(nodes[here]), sigma[here]
        drawn = [own.nonzero().flatten() for own in here.view(len(steps), len(self))]
        eps = torch.cat(
            [keys.at(own).noise(x.shape[1:], place, f"bridge {stream}") for place, own in enumerate(drawn)]
        ).to(x)
        found = Held.of(self.path.bridge(x, eps, begin, level), here)
        states = States(found.values, sigma, self.forest.tree.group[nodes], found.row)
        return states, self.path.bridge_velocity(x, eps, begin, level)

    def _all(self, steps: Sequence[int]) -> Tensor:
        return torch.ones(len(steps) * len(self), dtype=torch.bool)

    def _nodes(self, steps: Sequence[int], ahead: int) -> Tensor:
        return torch.cat([self.nodes[:, step + ahead] for step in steps])
