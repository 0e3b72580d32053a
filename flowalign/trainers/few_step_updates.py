"""The three updates of `FewStep` on one rollout: the fake score, the surrogate reward, the generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.objectives.distribution_matching import group_gate, learns, mean_square, pull
from flowalign.rollouts.collect import ScoredRollout
from flowalign.trainers.base import Update
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine
from samplers import Forest, Path, SampleKeys, ShiftedUniform, generator


@dataclass(frozen=True)
class Surrogate:
    """How the surrogate reward is trained: mean of (σ(z)·A·ℓ + kl·⟨(v − v_teacher)²⟩)·(j + 1)/K over states of step j of K, which
    is drawn in proportion to j + 1; ℓ its regression error there (see `group_gate` for z, which has the scale beta).

    clip_range, max_distance: where a state stops learning, see `learns`. min_sigma: the lowest noise level. Defaults of
    TDM-R1's released code (2603.07700) for OCR; its other rewards have other ones, see configs/methods/tdm_r1.yaml."""

    beta: float = 10.0
    kl: float = 0.001
    clip_range: float = 1e-3
    max_distance: float = 0.05
    min_sigma: float = 0.3

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.kl >= 0 and self.clip_range > 0 and self.max_distance > 0):
            raise ValueError(f"got {self}; expected beta, clip_range and max_distance above 0, and kl at least 0")
        if not 0 <= self.min_sigma < 1:
            raise ValueError(f"got surrogate.min_sigma={self.min_sigma}; expected a level inside [0, 1)")


@dataclass(frozen=True)
class Directions:
    """Along what the generator's predicted image x̂0 moves, all without gradient, at a state noised again (TDM-R1 2603.07700):

    d_kl = x̂0_teacher − x̂0_fake, weight 1; d_cfg = x̂0_teacher(guidance_scale) − x̂0_teacher, weight `distillation`;
    d_rew = x̂0_surrogate(reward_guidance_scale) − x̂0_teacher, weight 1 − distillation, at a noise level of its own of at least
    min_sigma. Beyond the first `steps` steps of the trajectory there is no reward, and d_kl has the weight `distillation` too.
    Each is divided by how far x̂0 is from where it leads, see `pull`. Guidance is v_u + w·(v_c − v_u), the paper's, from the
    negative prompt, also for a family with a rule of its own."""

    distillation: float = 0.3
    guidance_scale: float = 4.5
    reward_guidance_scale: float = 4.5
    min_sigma: float = 0.3
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1 or self.guidance_scale < 1 or self.reward_guidance_scale < 1:
            raise ValueError(f"got {self}; expected distillation inside [0, 1] and guidance scales from 1 (none)")
        if not 0 <= self.min_sigma < 1 or self.steps < 0:
            raise ValueError(f"got {self}; expected min_sigma inside [0, 1) and steps of at least 0")

    def weights(self, steps: Tensor) -> dict[str, Tensor]:
        """Of d_kl, d_cfg and d_rew for states of the trajectory's `steps` [S]."""
        rewarded = (steps < self.steps).double()
        return {
            "kl": rewarded + (1 - rewarded) * self.distillation,
            "cfg": torch.full_like(rewarded, self.distillation),
            "reward": rewarded * (1 - self.distillation),
        }


@dataclass(frozen=True, eq=False)
class Renoised:
    """States x [S, *] at sigma [S] from states `x_next` of `sigma_next` [S]; target [S, *]: their exact velocity in the mean."""

    x: Tensor
    sigma: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The N trajectories of a rollout as rows, and their draws. nodes [N, K+1]. shift, margin: see ShiftedUniform."""

    forest: Forest
    keys: SampleKeys
    path: Path
    nodes: Tensor
    shift: float
    margin: float

    @staticmethod
    def of(batch: ScoredRollout, seed: int, path: Path, shift: float, margin: float) -> Trajectories:
        """Of a rollout whose states are all stored."""
        tree = batch.forest.tree
        keys = SampleKeys.of(seed, batch.iteration, tree, tree.leaves, batch.uids)
        nodes = [tree.leaves]
        while bool((tree.parent[nodes[-1]] >= 0).all()):
            nodes.append(tree.parent[nodes[-1]])
        return Trajectories(batch.forest, keys, path, torch.stack(nodes[::-1], 1), shift, margin)

    @property
    def num_steps(self) -> int:
        return self.nodes.shape[1] - 1

    @property
    def groups(self) -> Tensor:
        """[N] the group of each."""
        return self.forest.tree.group[self.nodes[:, 0]]

    def random_steps(self, count: int) -> list[int]:
        """`count` different steps, the same for all trajectories."""
        rng = generator(self.keys.seed, "boundary", self.keys.iteration)
        return [int(step) for step in rng.permutation(self.num_steps)[:count]]

    def late_steps(self, count: int, number: int) -> list[int]:
        """`count` steps, repeats allowed, step j in proportion to j + 1."""
        rng, share = (
            generator(self.keys.seed, "late", self.keys.iteration, number),
            self.num_steps * (self.num_steps + 1) / 2,
        )
        weights = [(step + 1) / share for step in range(self.num_steps)]
        return [int(step) for step in rng.choice(self.num_steps, count, p=weights)]

    def states(self, steps: Sequence[int]) -> States:
        """What the generator was given in each of `steps` [M], in turn: S = M·N rows."""
        nodes = torch.cat([self.nodes[:, step] for step in steps])
        return States(self.forest.at(nodes), self.forest.sigma(nodes), self.forest.tree.group[nodes])

    def predictions(self, steps: Sequence[int]) -> Tensor:
        """x̂0 [S, *] there: of Euler's step x' = x − h·v that the rollout took, v = (x − x')/h."""
        parents, here = torch.cat([self.nodes[:, step] for step in steps]), self.states(steps)
        children = torch.cat([self.nodes[:, step + 1] for step in steps])
        length = (here.sigma - self.forest.sigma(children)).to(here.x).view(-1, *[1] * (here.x.ndim - 1))
        return self.path.x0_from_velocity(
            here.x, (here.x - self.forest.at(children)) / length, self.forest.sigma(parents)
        )

    def levels(self, steps: Sequence[int], stream: str, number: int, low: float, shared: bool) -> Tensor:
        """[S] noise levels above the end of each of `steps`, at least `low`. shared: one for all samples of a group."""
        keys, grid = self.keys.shared() if shared else self.keys, self.forest.sigmas
        found = []
        for place, step in enumerate(steps):
            law = ShiftedUniform(max(float(grid[step + 1]), low), self.shift, self.margin)
            found.append(keys.sigmas(law, 1, grid, self.path, f"sigma {stream} {number} {place}")[:, 0])
        return torch.cat(found)

    def renoised(self, steps: Sequence[int], sigma: Tensor, stream: str, number: int, shared: bool) -> Renoised:
        """The states at the ends of `steps` noised again, up to `sigma` [S]. shared: by one noise for all of a group."""
        keys, nodes = (
            self.keys.shared() if shared else self.keys,
            torch.cat([self.nodes[:, step + 1] for step in steps]),
        )
        x, low = self.forest.at(nodes), self.forest.sigma(nodes)
        draws = [number * len(steps) + place for place in range(len(steps))]
        eps = torch.cat([keys.noise(x.shape[1:], draw, f"bridge {stream}") for draw in draws]).to(x)
        return Renoised(
            self.path.bridge(x, eps, low, sigma), sigma, self.path.bridge_velocity(x, eps, low, sigma)
        )  # fmt: skip


@dataclass(eq=False)
class FewStepUpdates:
    """advantages [N]: of the samples. real: the role of the teacher. steps: of the trajectories, at which fake and the generator
    are trained; the surrogate is at as many."""

    engine: UpdateEngine
    trajectories: Trajectories
    advantages: Tensor
    real: str
    settings: Surrogate
    directions: Directions
    steps: Sequence[int]
    fake_kl: float
    micro_batch: int

    def __post_init__(self) -> None:
        rows = self.trajectories.groups
        self.rows, self.negative = rows.repeat(len(self.steps)), int(rows.max()) + 1

    def fake(self, trained: TrainedRole, number: int) -> Update:
        """mean ⟨(v − (x_τ − x̂0)/τ)²⟩ + fake_kl·⟨(v − v_teacher)²⟩ at states noised again, x̂0 what the generator predicted."""
        ways = self.trajectories
        noisy = ways.renoised(self.steps, ways.levels(self.steps, "fake", number, 0.0, False), "fake", number, False)
        x0, sigma = ways.predictions(self.steps), _like(noisy.sigma, noisy.x)
        target, states = (noisy.x - x0) / sigma, States(noisy.x, noisy.sigma, self.rows)
        real, rows = self.engine.frozen(states, self.real)

        def loss(part: Part, measures: Measures) -> Tensor:
            own = part.index[: part.real]
            velocity = self.engine.velocity(states.at(part.index), "fake")[: part.real]
            regression = mean_square(velocity - target[own]).sum() / len(states)
            anchor = self.fake_kl * mean_square(velocity - real[own]).sum() / len(states)
            measures.add(regression=regression, anchor=anchor)
            return regression + anchor

        def metrics(found: Measures) -> dict[str, float]:
            return {
                "loss/fake": found.total("regression"), "loss/fake_kl": found.total("anchor"),
                "cost/frozen_per_image": rows,
            }  # fmt: skip

        return self.engine.update(trained, self._parts(len(states)), loss, metrics)

    def surrogate_reward(self, trained: TrainedRole, number: int) -> Update:
        """See Surrogate. The gate couples a group: its errors are computed in a pass before."""
        ways, settings, engine = self.trajectories, self.settings, self.engine
        steps = ways.late_steps(len(self.steps), number)
        noisy = ways.renoised(
            steps, ways.levels(steps, "surrogate", number, settings.min_sigma, True), "surrogate", number, True
        )
        states, count = States(noisy.x, noisy.sigma, self.rows), len(self.rows)
        reference, rows = engine.frozen(states, self.real)
        old, more = engine.frozen(states, "surrogate_ema")
        errors = {name: mean_square(v - noisy.target).double() for name, v in (("reference", reference), ("old", old))}
        parts, before = self._parts(count), engine.task.policy.evaluations
        now = engine.scalars(
            count,
            parts,
            lambda part: mean_square(engine.velocity(states.at(part.index), "surrogate") - noisy.target[part.index]),
        )
        again = engine.task.processes.total(engine.task.policy.evaluations - before) / engine.images
        advantages, group = self.advantages.repeat(len(steps)).double(), ways.groups
        sets = torch.cat([group + place * self.negative for place in range(len(steps))])
        size = len(group) // self.negative
        gate = group_gate(now - errors["reference"].cpu(), advantages, sets, settings.beta / size)
        late = torch.tensor([(step + 1) / ways.num_steps for step in steps]).repeat_interleave(len(group))

        def loss(part: Part, measures: Measures) -> Tensor:
            own = part.index[: part.real]
            velocity = engine.velocity(states.at(part.index), "surrogate")[: part.real]
            error = mean_square(velocity - noisy.target[own])
            distance = mean_square(velocity - reference[own])
            mine = advantages[own].to(error)
            active = learns(
                error.detach(), errors["old"][own].to(error), errors["reference"][own].to(error), distance.detach(), mine,
                settings.clip_range, settings.max_distance,
            )  # fmt: skip
            weight = late[own].to(error) / count
            preference = (weight * gate[own].to(error) * mine * torch.where(active, error, error.detach())).sum()
            anchor = (weight * settings.kl * distance).sum()
            measures.add(preference=preference, anchor=anchor, stopped=~active, distance=distance)
            return preference + anchor

        def metrics(found: Measures) -> dict[str, float]:
            return {
                "loss/surrogate": found.total("preference"), "loss/surrogate_kl": found.total("anchor"),
                "surrogate/gate": float(gate.mean()), "surrogate/stopped": float(found.rows("stopped").mean()),
                "surrogate/distance": float(found.rows("distance").mean()),
                "cost/frozen_per_image": rows + more + again,
            }  # fmt: skip

        return engine.update(trained, parts, loss, metrics)

    def generator(self, trained: TrainedRole) -> Update:
        """See Directions. The only path of the gradient is the generator's own prediction of x̂0."""
        ways = self.trajectories
        states, count = ways.states(self.steps), len(self.rows)
        found, rows = self._targets()
        weights = self.directions.weights(torch.tensor(self.steps).repeat_interleave(count // len(self.steps)))

        def loss(part: Part, measures: Measures) -> Tensor:
            own = part.index[: part.real]
            here = states.at(part.index)
            velocity = self.engine.velocity(here)
            x0 = ways.path.x0_from_velocity(here.x, velocity, here.sigma)[: part.real]
            losses = {
                name: (weights[name][own].to(x0) * pull(x0, direction[own], near[own])).sum() / count
                for name, (direction, near) in found.items()
            }
            measures.add(**losses)
            return sum(losses.values(), torch.zeros((), device=x0.device))

        def metrics(measures: Measures) -> dict[str, float]:
            sizes = {f"direction/{name}": float(mean_square(d).mean().sqrt()) for name, (d, _) in found.items()}
            return {
                **{f"loss/{name}": measures.total(name) for name in found}, **sizes, "cost/frozen_per_image": rows,
            }  # fmt: skip

        return self.engine.update(trained, self._parts(count), loss, metrics)

    def _targets(self) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """Directions [S, *] by name, each with the image near which it leads; and network rows per sample."""
        ways, settings = self.trajectories, self.directions
        noisy = ways.renoised(self.steps, ways.levels(self.steps, "fake", 0, 0.0, False), "generator", 0, False)
        sigma = _like(noisy.sigma, noisy.x)
        fake, rows = self.engine.frozen(States(noisy.x, noisy.sigma, self.rows), "fake")
        real, guided, more = self._guided(noisy, self.rows, self.real, settings.guidance_scale)
        near = noisy.x - sigma * guided
        found = {"kl": (-sigma * (real - fake), near), "cfg": (-sigma * (guided - real), near)}
        rewarded = [step for step in self.steps if step < settings.steps]
        if not rewarded:
            return found, rows + more
        levels = ways.levels(rewarded, "reward", 0, settings.min_sigma, True)
        noisy = ways.renoised(rewarded, levels, "reward", 0, True)
        mine = torch.cat([torch.full_like(ways.groups, int(step < settings.steps)) for step in self.steps]).bool()
        sigma, own = _like(noisy.sigma, noisy.x), self.rows[mine]
        _, surrogate, third = self._guided(noisy, own, "surrogate", settings.reward_guidance_scale)
        reference, last = self.engine.frozen(States(noisy.x, noisy.sigma, own), self.real)
        direction, target = torch.zeros_like(near), near.clone()
        direction[mine.to(near.device)] = -sigma * (surrogate - reference)
        target[mine.to(near.device)] = noisy.x - sigma * surrogate
        found["reward"] = direction, target
        return found, rows + more + third + last

    def _guided(self, noisy: Renoised, rows: Tensor, role: str, scale: float) -> tuple[Tensor, Tensor, float]:
        """Velocities under the prompt, and v_u + scale·(v_c − v_u) with the negative prompt's; and network rows per sample."""
        conditional, first = self.engine.frozen(States(noisy.x, noisy.sigma, rows), role)
        negative, second = self.engine.frozen(States(noisy.x, noisy.sigma, rows + self.negative), role)
        return conditional, negative + scale * (conditional - negative), first + second

    def _parts(self, count: int) -> list[Part]:
        return self.engine.micro_batches(count, self.micro_batch)


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """σ [S] to multiply with x [S, *]."""
    return sigma.to(x).view(-1, *[1] * (x.ndim - 1))
