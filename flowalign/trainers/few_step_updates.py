"""The three updates of `FewStep` on one rollout: the fake score, the surrogate reward, the generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.objectives import AdvantageWeighted, DrawIds, GroupPreference, VelocityAnchor
from flowalign.objectives.distribution_matching import directional_loss
from flowalign.trainers.base import Update
from flowalign.trainers.boundaries import Boundaries
from flowalign.trainers.state_update import Draws, StateUpdate
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine
from samplers import Held, send
from samplers.kernels.base import spread


@dataclass(frozen=True)
class Surrogate:
    """How the surrogate reward is trained: `GroupPreference` of the ends of the steps j of K, noised again by a noise that the
    group shares, plus kl·⟨(v − v_teacher)²⟩; a step is drawn in proportion to j + 1, and has the weight (j + 1)/K.

    beta, clip, max_distance: see GroupPreference; its guard is a fast average of the surrogate. min_sigma: the lowest noise
    level. Defaults of TDM-R1's released code (2603.07700) for OCR; for other rewards see configs/methods/tdm_r1.yaml."""

    beta: float = 10.0
    kl: float = 0.001
    clip: float = 1e-3
    max_distance: float = 0.05
    min_sigma: float = 0.3

    def __post_init__(self) -> None:
        self.objective("reference")
        self.anchor("reference")
        if not 0 <= self.min_sigma < 1:
            raise ValueError(f"got surrogate.min_sigma={self.min_sigma}; expected a level inside [0, 1)")

    def objective(self, teacher: str) -> GroupPreference:
        """Against the role of the teacher."""
        return GroupPreference(
            self.beta, reference=teacher, guard="surrogate_ema", clip=self.clip, max_distance=self.max_distance
        )

    def anchor(self, teacher: str) -> VelocityAnchor:
        """To the role of the teacher."""
        return VelocityAnchor(self.kl, teacher)


@dataclass(frozen=True)
class Directions:
    """Along what the generator's predicted image x̂0 moves, all without gradient, at a state noised again (TDM-R1 2603.07700):

    d_kl = x̂0_teacher − x̂0_fake, weight 1; d_cfg = x̂0_teacher(guidance_scale) − x̂0_teacher, weight `distillation`;
    d_reward = x̂0_surrogate(reward_guidance_scale) − x̂0_teacher, weight 1 − distillation, at a noise level of its own of at least
    min_sigma. Beyond the first `steps` steps of the trajectory there is no reward, and d_kl has the weight `distillation` too.
    Each is divided by how far x̂0 is from where it leads, see `directional_loss`. Guidance is v_u + w·(v_c − v_u), the paper's, from the
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
        """[S] of each direction, at `steps` [S] of the trajectory."""
        rewarded = (steps < self.steps).double()
        return {
            "kl": rewarded + (1 - rewarded) * self.distillation,
            "cfg": torch.full_like(rewarded, self.distillation),
            "reward": rewarded * (1 - self.distillation),
        }


@dataclass(eq=False)
class FewStepUpdates:
    """The updates of one rollout of N trajectories, a method for each of the three networks.

    engine: its conditions are those of the P prompts, then those of their P negative prompts. ways: the trajectories, with the
    states that this process trains. deal: who trains which of the S = M·N states at M steps. advantages [N]: of their samples.
    teacher: the role that is the teacher. steps: the M at which fake and the generator are trained; the surrogate is at as
    many, drawn anew. fake_kl: see FewStep. micro_batch: states per forward and backward."""

    engine: UpdateEngine
    ways: Boundaries
    deal: Deal
    advantages: Tensor
    teacher: str
    surrogate: Surrogate
    directions: Directions
    steps: Sequence[int]
    fake_kl: float
    micro_batch: int

    def __post_init__(self) -> None:
        self._here, self._mine = (torch.zeros(len(self.deal), dtype=torch.bool) for _ in range(2))
        self._here[self.deal.padded[self.deal.rank]] = True  # [S] whose latents this process has
        self._mine[self.deal.mine] = True  # [S] which it trains

    def fake(self, trained: TrainedRole, number: int) -> Update:
        """mean ⟨(v − (x_τ − x̂0)/τ)²⟩ + fake_kl·⟨(v − v_teacher)²⟩ at states noised again, x̂0 what the generator predicted."""
        sigma = self.ways.levels(self.steps, f"fake {number}", 0.0, shared=False)
        states, _ = self.ways.noised(self.steps, sigma, f"fake {number}", self._here, shared=False)
        x, level = states.x, sigma[self._here]
        target = (x - self.ways.predictions(self.steps, self._here)) / spread(level.to(x), x)
        anchor = VelocityAnchor(self.fake_kl, self.teacher)
        anchors = {"fake_kl": anchor} if anchor.active else {}
        draws = self._draws(states, target, self.steps, torch.ones(len(self.ways)))
        return StateUpdate(self.engine, draws, AdvantageWeighted(), anchors, self.micro_batch, "fake").update(trained)

    def surrogate_reward(self, trained: TrainedRole, number: int) -> Update:
        """See Surrogate."""
        steps, settings = self.ways.late_steps(len(self.steps), number), self.surrogate
        sigma = self.ways.levels(steps, f"surrogate {number}", settings.min_sigma, shared=True)
        states, target = self.ways.noised(steps, sigma, f"surrogate {number}", self._here, shared=True)
        late = torch.tensor([(step + 1) / self.ways.num_steps for step in steps]).repeat_interleave(len(self.ways))
        draws = self._draws(states, target, steps, self.advantages, late)
        anchor = settings.anchor(self.teacher)
        anchors = {"surrogate_kl": anchor} if anchor.active else {}
        objective = settings.objective(self.teacher)
        return StateUpdate(self.engine, draws, objective, anchors, self.micro_batch, "surrogate").update(trained)

    def _draws(
        self, states: States, target: Tensor, steps: Sequence[int], advantages: Tensor, weight: Tensor | None = None
    ) -> Draws:
        places = torch.arange(len(steps)).repeat_interleave(len(self.ways))
        noise = self.ways.path.mix(states.sigma.double())[1]
        ids = DrawIds(advantages.repeat(len(steps)), states.rows, places)
        return Draws(states, Held.of(target, self._here), noise, ids, self.deal, weight)

    def generator(self, trained: TrainedRole) -> Update:
        """See Directions. The only path of the gradient is the generator's own prediction of x̂0."""
        states, (found, rows) = self.ways.states(self.steps, self._here), self._targets()
        weights = self.directions.weights(torch.tensor(self.steps).repeat_interleave(len(self.ways)))

        def loss(part: Part, measures: Measures) -> Tensor:
            own, here = part.index[: part.real], states.at(part.index)
            rows = [
                values
                for name, (direction, near) in found.items()
                for values in (weights[name][own], direction.at(own), near.at(own))
            ]
            x, sigma, condition, *sent = send(self.engine.device, here.x, here.sigma, here.rows, *rows)
            here, aims = States(x, sigma, condition), zip(found, sent[::3], sent[1::3], sent[2::3], strict=True)
            x0 = self.ways.path.x0_from_velocity(here.x, self.engine.velocity(here), here.sigma)[: part.real]
            losses = {
                name: (weight.to(x0) * directional_loss(x0, direction, near)).sum() / len(states)
                for name, weight, direction, near in aims
            }
            measures.add(**losses)
            return sum(losses.values(), torch.zeros((), device=x0.device))

        def metrics(measures: Measures) -> dict[str, float]:
            sizes = {f"direction/{name}": self._size(direction.values) for name, (direction, _) in found.items()}
            return {
                **{f"loss/{name}": measures.total(name) for name in found}, **sizes, "cost/frozen_per_image": rows,
            }  # fmt: skip

        return self.engine.update(trained, self.engine.micro_batches(self.deal, self.micro_batch), loss, metrics)

    def _size(self, direction: Tensor) -> float:
        """The root mean square of the elements of all processes."""
        own = float(direction.square().mean()) * len(direction) if len(direction) else 0.0
        mean = self.engine.task.processes.total(own) / len(self.deal)
        return float(torch.tensor(mean, dtype=direction.dtype).sqrt())

    def _targets(self) -> tuple[dict[str, tuple[Held, Held]], float]:
        """Directions [S, *] by name, each with the image near which it leads; and network rows per sample."""
        ways, settings, mine = self.ways, self.directions, self._mine
        states, _ = ways.noised(
            self.steps, ways.levels(self.steps, "fake 0", 0.0, shared=False), "generator", mine, shared=False
        )
        sigma = spread(states.sigma[mine].to(states.x), states.x)
        fake, rows = self._frozen(states, "fake")
        real, guided, more = self._guided(states, self.teacher, settings.guidance_scale)
        near = states.x - sigma * guided
        found = {"kl": (-sigma * (real - fake), near), "cfg": (-sigma * (guided - real), near)}
        rewarded = [step for step in self.steps if step < settings.steps]
        if rewarded:
            is_rewarded = torch.tensor([step < settings.steps for step in self.steps]).repeat_interleave(len(ways))
            states, _ = ways.noised(
                rewarded, ways.levels(rewarded, "reward", settings.min_sigma, shared=True), "reward", mine[is_rewarded],
                shared=True,
            )  # fmt: skip
            sigma = spread(states.sigma[mine[is_rewarded]].to(states.x), states.x)
            _, surrogate, third = self._guided(states, "surrogate", settings.reward_guidance_scale)
            reference, last = self._frozen(states, self.teacher)
            own = is_rewarded[mine].to(near.device)
            direction, target = torch.zeros_like(near), near.clone()
            direction[own], target[own] = -sigma * (surrogate - reference), states.x - sigma * surrogate
            found, rows = found | {"reward": (direction, target)}, rows + third + last
        return {name: (Held.of(d, mine), Held.of(n, mine)) for name, (d, n) in found.items()}, rows + more

    def _frozen(self, states: States, role: str) -> tuple[Tensor, float]:
        """v [k, *] of the states whose x this process has, and network rows per sample."""
        assert states.row is not None
        found, rows = self.engine.frozen(states, role, mine=(states.row >= 0).nonzero().flatten())
        return found.values, rows

    def _guided(self, states: States, role: str, scale: float) -> tuple[Tensor, Tensor, float]:
        """v_c and v_u + scale·(v_c − v_u) [k, *], v_u under the negative prompt; and network rows per sample."""
        without = replace(states, rows=states.rows + len(self.engine.conditions) // 2)
        conditional, first = self._frozen(states, role)
        negative, second = self._frozen(without, role)
        return conditional, negative + scale * (conditional - negative), first + second
