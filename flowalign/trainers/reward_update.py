"""One update of back-propagation: samples made and scored with graph, micro-batch by micro-batch, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from flowalign.data import PromptRecord
from flowalign.objectives import Regularizer, RewardLoss, RoleSteps
from flowalign.rollouts.gather import gather_scores
from flowalign.rollouts.judging import decoded
from flowalign.rollouts.metrics import reward_metrics
from flowalign.trainers.update_engine import Measures, Part, States, UpdateEngine
from flowalign.truncations import Chains, Outcome, Truncation, Visit
from rewards import RewardOutput, channels_of, score
from rewards.answers import cat, no_answer
from rewards.guard import MAX_FAIL_RATE, check_rate
from samplers import Kernel, KeyedNoise, SampleKeys, TransitionContext, Tree, send
from samplers.noise import generator


def divergences(term: Regularizer, kernel: Kernel, visits: Sequence[Visit], others: Sequence[Tensor]) -> Tensor:
    """[n] the mean over the visits of the term's divergence from the same calls under its role, with velocities `others`."""
    found = []
    for visit, v in zip(visits, others, strict=True):
        ctx = TransitionContext(level=visit.level, step=torch.full((len(v),), visit.step), replay=True)
        own, other = (
            RoleSteps(kernel(visit.x, each, visit.sigma, visit.sigma_next, ctx), each) for each in (visit.v, v)
        )
        found.append(term.divergence(own, other))
    return torch.stack(found).mean(0)


@dataclass(eq=False)
class RewardUpdate:
    """The loss of the samples of one iteration, which are made, decoded and scored inside the loss of their micro-batch.

    tree: independent chains, a group for each of the `prompts`, over the levels sigmas [T+1]; shape: of one latent.
    checkpoint: see BackPropagation. What this process has seen of the reward so far, for the metrics: answered, the samples;
    answers, their scores on the first of the truncation's looks, under the first of its words.
    done: the numbers of the micro-batches whose forward is done; what their backward computes again is not counted."""

    engine: UpdateEngine
    truncation: Truncation
    loss: RewardLoss
    regularizers: Mapping[str, Regularizer]
    prompts: Sequence[PromptRecord]
    tree: Tree
    iteration: int
    sigmas: Tensor
    shape: tuple[int, ...]
    checkpoint: bool
    answers: list[RewardOutput] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._before = replace(self.engine.task.counts)

    @cached_property
    def _noise(self) -> KeyedNoise:
        uids = [record.uid for record in self.prompts]
        return KeyedNoise(self.engine.task.seed, self.iteration, uids, self.shape)

    def loss_of(self, part: Part, measures: Measures) -> Tensor:
        """The share of one micro-batch."""
        seed, count, real = self.engine.task.seed, self.engine.images, part.real
        measures.count(rollout=0, frozen=0)  # the same names on every process
        rng = generator(seed, "truncation", self.iteration)
        outcome = self.truncation.run(self._chains(part, measures), rng)
        # what padding has of the graph weighs nothing, but its backward runs
        losses = {"policy": torch.cat(outcome.looks)[:0].sum()}
        if real:
            losses["policy"] = losses["policy"] + self._rewarded(outcome, part).sum() / count
        for name, term in self.regularizers.items():
            others = [self._under(term.role, visit, part, measures) for visit in outcome.visits]
            divergence = divergences(term, self.engine.task.rollout.kernel, outcome.visits, others)
            losses[name] = term.beta * divergence[:real].sum() / count
        self.done.add(part.number)
        measures.add(**{f"loss/{name}": loss for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def _velocity(self, part: Part, states: States, role: str = "policy") -> tuple[Tensor, int]:
        """The velocities [n, *], and the network rows that count."""
        policy = self.engine.task.policy
        before, padded = policy.evaluations, policy.padded
        try:
            return self.engine.velocity(states, role), policy.evaluations - before
        finally:  # torch leaves a recomputation by an exception, once it has what it needs
            if part.number in self.done:
                policy.evaluations, policy.padded = before, padded

    def _chains(self, part: Part, measures: Measures) -> Chains:
        """The chains of a micro-batch."""
        task, tree, rows = self.engine.task, self.tree, part.index
        groups, policy = tree.group[rows], task.policy

        def velocity(x: Tensor, sigma: Tensor, row: Tensor) -> Tensor:
            v, count = self._velocity(part, States(x, sigma, groups[row]))
            if not torch.is_grad_enabled():
                measures.count(rollout=count)
            return v

        x = policy.start(self._noise.start(tree, rows))
        stochastic = [step for step, nodes in enumerate(tree.generations[1:]) if float(tree.level[nodes[0]])]
        draws = [self._noise.step(tree, tree.generations[step + 1][rows]) for step in stochastic]
        noise = dict(zip(stochastic, (eps.to(x) for eps in send(x.device, *draws)), strict=True))
        keys = SampleKeys.of(
            task.seed, self.iteration, tree, tree.leaves[rows], [record.uid for record in self.prompts]
        )
        return Chains(
            velocity, x, self.sigmas, task.rollout.kernel, policy.path, lambda number: send(x.device, keys.noise(self.shape, number))[0].to(x),
            noise, self.checkpoint,
        )  # fmt: skip

    def _rewarded(self, outcome: Outcome, part: Part) -> Tensor:
        """[real] the loss of the samples; 0 without graph where there is no score."""
        task, rows, real = self.engine.task, part.index[: part.real], part.real
        looks = len(outcome.looks)
        batch = decoded(
            task, self.prompts, self.tree.group[rows].repeat(looks), torch.cat([look[:real] for look in outcome.looks]),
            task.reward.spec.inputs, numbers=rows.repeat(looks).tolist(), grad=True,
        )  # fmt: skip
        total = torch.zeros(len(batch), device=outcome.looks[0].device)
        valid = torch.ones_like(total, dtype=torch.bool)
        for number, (weight, text) in enumerate(outcome.words):
            asked = replace(batch, prompts=[text + prompt for prompt in batch.prompts])
            task.counts.reward_calls += len(batch)
            output = score(task.reward, asked, grad=True, max_fail_rate=1.0)
            ok = output.valid[:, 0].to(total.device)
            total, valid = total + weight * torch.where(ok, output.scores[:, 0].to(total.device), 0.0), valid & ok
            if number == 0:
                self._remember(output, rows)
        loss = torch.where(valid, self.loss.of(total), 0.0).view(looks, real).mean(0)
        return loss if outcome.weight is None else loss * outcome.weight[:real].to(loss)

    def _remember(self, output: RewardOutput, rows: Tensor) -> None:
        """The answer on the first look, for metrics."""
        count = len(rows)
        self.answers.append(
            RewardOutput(
                output.scores[:count].detach().cpu(), output.valid[:count].cpu(),
                {name: values[:count].detach().cpu() for name, values in output.components.items()},
                output.info[:count], output.elapsed, channels=output.channels,
            )
        )  # fmt: skip
        self.answered += rows.tolist()

    def _under(self, role: str, visit: Visit, part: Part, measures: Measures) -> Tensor:
        """The velocity of the visit under another role; with graph to the input if that has one."""
        groups = self.tree.group[part.index]

        def velocity(x: Tensor) -> Tensor:
            states = States(x, x.new_full((len(x),), float(visit.sigma), dtype=visit.sigma.dtype), groups)
            v, count = self._velocity(part, states, role)
            measures.count(frozen=count)
            return v

        with torch.set_grad_enabled(visit.x.requires_grad):
            return recomputed(velocity, visit.x, use_reentrant=False) if self.checkpoint else velocity(visit.x)

    def metrics(self, measures: Measures) -> dict[str, float]:
        """Once the step is taken; of the weights before it. RewardError if too many samples have no score."""
        task, processes, images = self.engine.task, self.engine.task.processes, self.engine.images
        channels = channels_of(task.reward)
        output = cat(self.answers or [replace(no_answer(0, len(channels)), channels=channels)])
        texts = [self.prompts[int(self.tree.group[row])].prompt for row in self.answered]
        check_rate(task.reward.name, output, texts, self.answered, MAX_FAIL_RATE)
        everything = gather_scores(processes, output)
        spent = task.counts.since(self._before)
        return {
            **reward_metrics(task.reward.name, everything, torch.ones(len(everything.scores), dtype=torch.bool)),
            "cost/decodes_per_image": processes.total(spent.decodes) / images,
            "cost/reward_calls_per_image": processes.total(spent.reward_calls) / images,
            "time/reward": output.elapsed,
            "time/decode": spent.decode_seconds,
            **{name: measures.total(name) for name in measures.values if name.startswith("loss/")},
        }
