"""Groups of an iteration rolled out, with the scores of their states by process rewards."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.models.grid import grid
from flowalign.rollouts.completions import OLD, completed
from flowalign.rollouts.gather import Part, encoded
from flowalign.rollouts.guidance import GuidedRollout
from flowalign.rollouts.judging import decoded, judge
from flowalign.rollouts.previews import Previews
from flowalign.rollouts.sources import by_source, hinted, roles_of
from flowalign.rollouts.task import Rollout, Task
from rewards import RewardBatch, RewardOutput
from rewards.answers import cat
from rewards.guard import MAX_FAIL_RATE, check_rate
from samplers import SOURCES, FlowSDE, Forest, KeyedNoise, Tree, Velocity, drawn_ahead, rollout, sampled, unscored
from samplers.noise import generator, visits


def grow(settings: Rollout, seed: int, iteration: int, groups: Iterable[int]) -> Tree:
    """The topology of some groups of an iteration. A plan draws from a generator keyed by iteration and group: the same
    whichever process rolls the group out."""
    trees = []
    for group in groups:
        rng = generator(seed, "select", iteration, group if settings.draw == "group" else 0)
        trees.append(settings.plan.tree(settings.num_inference_steps, settings.group_size, iteration, rng))
    return Tree.cat(trees)


def outline(settings: Rollout) -> Forest:
    """The forest of one group of the first iteration, after the plan's selection, with one number in the place of a latent."""
    tree, steps = grow(settings, 0, 0, [0]), settings.num_inference_steps
    return rollout(
        lambda x, sigma, root: x, torch.zeros(tree.num_roots, 1), torch.linspace(1, 0, steps + 1), tree, FlowSDE(),
        lambda tree, nodes: torch.zeros(len(nodes), 1), select=settings.plan.select(unscored),
    )  # fmt: skip


def leaves_per_group(settings: Rollout) -> tuple[int, int]:
    """(samples, probes) that one group ends in, see `outline`."""
    forest = outline(settings)
    samples = int(sampled(forest.tree).sum())
    return samples, len(forest.tree.leaves) - samples


class Rolling:
    """Rolls out the groups of one iteration, a group for each of `prompts`. conditions: a row per group. seconds: by phase. device:
    where states are while the network has them."""

    def __init__(
        self, task: Task, prompts: Sequence[PromptRecord], iteration: int, roll: Callable[..., Forest],
        keep_velocities: bool,
    ) -> None:  # fmt: skip
        self._task, self._prompts, self._iteration, self._roll = task, prompts, iteration, roll
        self._keep_velocities, self.seconds = keep_velocities, defaultdict[str, float](float)
        self._state_answers = defaultdict[str, list[tuple[RewardOutput, list[str]]]](list)  # by process reward
        policy, settings = task.policy, task.rollout
        negative = policy.rows_per_state(settings.guidance_scale) > 1
        self.conditions = self._hinted = encoded(task, prompts, negative=negative)
        if settings.hint_key is not None:  # the rows of the hinted prompts follow those of the prompts
            hints = encoded(task, [hinted(record, settings.hint_key) for record in prompts], negative=negative)
            self._hinted = Conditions.cat([self.conditions, hints])
        self._shape = policy.latent_shape(task.size_of(prompts))
        self.device = policy.start(torch.empty(0, *self._shape)).device
        self._sigmas = grid(policy, settings.schedule, settings.num_inference_steps, self._shape)

    def part(self, groups: Sequence[int], attempt: int = 0) -> Part:
        """The forest of these groups, with the scores of its states. attempt: another number, other noise."""
        task, numbers, began = self._task, torch.tensor(list(groups)), time.perf_counter()
        completing = any(reward.spec.scope == "completion" for reward in task.process_rewards)
        tree = grow(task.rollout, task.seed, self._iteration, groups)
        velocity = self._velocity(tree, numbers)
        forest = self._rolled_out(tree, numbers, attempt, velocity, self._keep_velocities or completing)
        rolled = time.perf_counter()
        forest = self._with_state_scores(forest, numbers, velocity)
        if completing and not self._keep_velocities:
            forest = replace(forest, velocities={k: v for k, v in forest.velocities.items() if k != OLD})
        self.seconds["rollout"] += rolled - began
        if task.process_rewards:
            self.seconds["process"] += time.perf_counter() - rolled
        return Part(numbers, forest)

    def check_states(self) -> None:
        """RewardError if a process reward has no score for more than half of the states of all parts together."""
        for name, answers in self._state_answers.items():
            output, prompts = cat([each for each, _ in answers]), [text for _, texts in answers for text in texts]
            check_rate(name, output, prompts, list(range(len(prompts))), MAX_FAIL_RATE)

    def _velocity(self, tree: Tree, numbers: Tensor) -> Velocity:
        """The velocities of the states of `tree`, whose groups are `numbers` [G] of the prompts."""
        settings, policy, conditions = self._task.rollout, self._task.policy, self._hinted
        row_of_root = numbers[tree.group[: tree.num_roots]]
        if settings.hint_key is not None:
            is_hinted = tree.source[: tree.num_roots] == SOURCES.index("hinted")
            row_of_root = row_of_root + len(self._prompts) * is_hinted

        def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
            rows = conditions.rows(row_of_root[root])
            return policy.velocity(
                x, sigma, rows, guidance_scale=settings.guidance_scale, detach_uncond=settings.detach_uncond
            )

        roles = roles_of(settings, tree)
        return velocity if len(roles) == 1 else by_source(velocity, policy, tree, roles, settings.micro_batch)

    def _rolled_out(
        self, tree: Tree, numbers: Tensor, attempt: int, velocity: Velocity, keep_velocities: bool
    ) -> Forest:
        """A plan that selects continues states by the reward of their previews, which are then discarded."""
        task, settings = self._task, self._task.rollout
        uids = [record.uid for record in self._prompts]
        visit = [number + attempt * len(uids) for number in visits(uids)]
        own = numbers.tolist()
        noise = KeyedNoise(
            task.seed, self._iteration, [uids[number] for number in own], self._shape,
            visits=[visit[number] for number in own], branch_scale=settings.branch_scale,
        )  # fmt: skip
        previews = Previews(
            lambda groups, latents: judge(
                task, self._prompts, numbers[groups], latents, settings.preview_reward or task.reward
            )
        )
        select = settings.plan.select(previews.score)
        guided = self._guided(tree, numbers, noise)
        kernel = settings.kernel if guided is None else guided.kernel
        with drawn_ahead(noise.step, tree, self.device) as drawn:
            forest = self._roll(
                velocity, task.policy.start(noise.start(tree)), self._sigmas, tree, kernel, drawn,
                micro_batch=settings.micro_batch if len(roles_of(settings, tree)) == 1 else None, select=select,
                keep_velocities=keep_velocities,
            )  # fmt: skip
        if guided is not None:
            forest = guided.recorded(tree, forest)
        return forest if select is None else previews.on(forest)

    def _guided(self, tree: Tree, numbers: Tensor, noise: KeyedNoise) -> GuidedRollout | None:
        """What guides the rollout, if a reward's gradient does."""
        task, guidance = self._task, self._task.rollout.reward_guidance
        if guidance is None:
            return None
        reward = guidance.judge(task.process_rewards)

        def batch(owner: Tensor, latents: Tensor, sigma: Tensor) -> RewardBatch:
            task.counts.reward_calls += len(latents)
            grad = latents.requires_grad
            return decoded(task, self._prompts, owner, latents, reward.spec.inputs, sigma, grad=grad)

        return guidance.begin(
            task.rollout.kernel, task.policy.path, reward, batch, numbers[tree.group[: tree.num_roots]],
            partial(noise.probes, tree), task.rollout.micro_batch,
        )  # fmt: skip

    def _with_state_scores(self, forest: Forest, numbers: Tensor, velocity: Velocity) -> Forest:
        """The forest with the scores of the task's process rewards at both ends of every stochastic step, by channel name."""
        task, ends = self._task, torch.cat([forest.tree.edges, forest.tree.parents_of_edges]).unique()
        specs = [reward.spec for reward in task.process_rewards if reward.spec.scope == "completion"]
        widest = {spec.completion_steps: 0.0 for spec in specs}  # rewards of as many steps share their completions
        for spec in specs:
            widest[spec.completion_steps] = max(widest[spec.completion_steps], spec.max_sigma)
        below = {steps: ends[forest.sigma(ends).cpu() <= sigma] for steps, sigma in widest.items()}
        made = {
            steps: completed(forest, nodes, steps, velocity, task.rollout.micro_batch, self.device)
            for steps, nodes in below.items()
        }
        for reward in task.process_rewards:
            nodes = ends[forest.sigma(ends).cpu() <= reward.spec.max_sigma]
            if reward.spec.scope == "completion":
                steps = reward.spec.completion_steps
                states = made[steps][torch.searchsorted(below[steps], nodes)]
                sigma = torch.zeros(len(nodes))
            else:
                states, sigma = forest.at(nodes), forest.sigma(nodes)
            owner = numbers[forest.tree.group[nodes]]
            output = judge(task, self._prompts, owner, states, reward, sigma, 1.0, self.device)
            texts = [self._prompts[number].prompt for number in owner.tolist()]
            self._state_answers[reward.name].append((output, texts))
            for channel, column in zip(output.channels, output.scores.T, strict=True):
                forest = forest.with_scores(channel, at_nodes(forest, nodes, column))
        return forest


def at_nodes(forest: Forest, nodes: Tensor, values: Tensor) -> Tensor:
    """[N] `values` [n] at `nodes` [n], nan elsewhere."""
    return torch.full((len(forest.tree),), torch.nan).index_copy(0, nodes, values.float())
