"""One rollout of one iteration, from prompts to scored leaves: shared by every trainer that samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from flowalign.credit.base import uncertainty_of
from flowalign.data import PromptRecord, source_images
from flowalign.models.base import Conditions
from flowalign.models.grid import grid
from flowalign.rollouts.gather import gather_forest, gather_output, gather_tree
from flowalign.rollouts.guidance import GuidedRollout, measured
from flowalign.rollouts.metrics import cost_metrics, process_metrics, reward_metrics
from flowalign.rollouts.previews import Previews
from flowalign.rollouts.sources import by_source, hinted, roles_of
from flowalign.rollouts.task import Rollout, Task
from flowalign.rollouts.tree_plot import plot_tree
from rewards import Reward, RewardBatch, RewardOutput, pictures, score_chunks
from samplers import SOURCES, FlowSDE, Forest, KeyedNoise, Tree, rollout, sampled, unscored
from samplers.noise import generator, visits


@dataclass(frozen=True, eq=False)
class ScoredRollout:
    """A scored forest. conditions: one row per group. scores [L, C], valid [L, C]: of `tree.leaves`, probes among them, a column
    per name in `channels`. forest.scores: of states by the task's process rewards, and `uncertainty/<channel>` of leaves.

    uids: the prompt uid of each group."""

    forest: Forest
    conditions: Conditions
    scores: Tensor
    valid: Tensor
    channels: tuple[str, ...]
    iteration: int
    metrics: dict[str, float]
    uids: tuple[int, ...] = ()

    @cached_property
    def images(self) -> int:
        """How many samples there are; the leaf of a probe is none."""
        return int(sampled(self.forest.tree).sum())

    @property
    def uncertainty(self) -> Tensor | None:
        """[L, C] how far each score may be off, nan where that is not known; None if the reward states none."""
        names, leaves = [uncertainty_of(channel) for channel in self.channels], self.forest.tree.leaves
        if any(name not in self.forest.scores for name in names):
            return None
        return torch.stack([self.forest.scores[name][leaves] for name in names], 1)

    def picture(self) -> bytes:
        """The tree, colored by the first reward: a PNG."""
        return plot_tree(self.forest, self.scores[:, 0], self.valid[:, 0])


def grow(settings: Rollout, seed: int, iteration: int, groups: Iterable[int]) -> Tree:
    """The topology of some groups of an iteration. A plan draws from a generator keyed by iteration and group: the same
    whichever process rolls the group out."""
    trees = []
    for group in groups:
        rng = generator(seed, "select", iteration, group if settings.draw == "group" else 0)
        trees.append(settings.plan.tree(settings.num_inference_steps, settings.group_size, iteration, rng))
    return Tree.cat(trees)


def leaves_per_group(settings: Rollout) -> tuple[int, int]:
    """(samples, probes) that one group ends in, counted on the first iteration's topology, after the plan's selection."""
    tree, steps = grow(settings, 0, 0, [0]), settings.num_inference_steps
    forest = rollout(
        lambda x, sigma, root: x, torch.zeros(tree.num_roots, 1), torch.linspace(1, 0, steps + 1), tree, FlowSDE(),
        lambda tree, nodes: torch.zeros(len(nodes), 1), select=settings.plan.select(unscored),
    )  # fmt: skip
    samples = int(sampled(forest.tree).sum())
    return samples, len(forest.tree.leaves) - samples


@torch.no_grad()
def collect(
    task: Task, prompts: Sequence[PromptRecord], iteration: int, *, keep_velocities: bool = False,
    roll: Callable[..., Forest] | None = None,
) -> ScoredRollout:  # fmt: skip
    """Rolls out `prompts` (one group each), decodes every leaf and scores it.

    keep_velocities: the forest keeps the rollout's own velocities, as the role "old". roll: another engine with the
    arguments of `rollout`. Each process rolls out whole groups, its share; what is returned is the batch of all."""
    processes, rows_before, before = task.processes, task.policy.evaluations, replace(task.counts)
    share = processes.share(len(prompts))
    conditions = task.policy.encode(prompts, negative=task.rollout.guidance_scale != 1)
    began = time.perf_counter()
    forest = _roll_out(
        task, prompts, conditions, iteration, share, partial(roll or rollout, keep_velocities=keep_velocities)
    )
    rolled, leaves = time.perf_counter(), forest.tree.leaves
    forest = _with_state_scores(task, prompts, forest, share.start)
    began_leaves = time.perf_counter()
    output = _judge(task, prompts, forest.tree.group[leaves] + share.start, forest.at(leaves))
    decoding = time.perf_counter() - began_leaves - output.elapsed
    milliseconds = 1000 * output.elapsed / len(leaves)
    rows = processes.total(task.policy.evaluations - rows_before)
    decodes = processes.total(task.counts.decodes - before.decodes)
    calls = processes.total(task.counts.reward_calls - before.reward_calls)
    if processes.count > 1:
        planned = grow(task.rollout, task.seed, iteration, range(len(prompts)))
        tree = gather_tree(processes, planned, forest.tree)
        forest, output = gather_forest(processes, tree, forest), gather_output(processes, tree, output)
    forest = _with_uncertainty(forest, output)
    guidance = task.rollout.reward_guidance
    if guidance is not None:
        forest = guidance.replayed(forest, task.policy.path)
    metrics = {
        **reward_metrics(task.reward.name, forest, output),
        **cost_metrics(forest, output, rows, decodes, calls),
        "time/rollout": rolled - began,
        "time/decode": decoding,
        "time/reward": output.elapsed,
        "time/reward_ms_per_image": milliseconds,
        **process_metrics(task.process_rewards, forest, began_leaves - rolled),
        **({} if guidance is None else measured(forest)),
    }
    uids = tuple(record.uid for record in prompts)
    return ScoredRollout(forest, conditions, output.scores, output.valid, output.channels, iteration, metrics, uids)


def _roll_out(
    task: Task, prompts: Sequence[PromptRecord], conditions: Conditions, iteration: int, share: range,
    roll: Callable[..., Forest],
) -> Forest:  # fmt: skip
    """The forest of this process's groups. A plan that selects continues states by the reward of their previews, which are
    then discarded."""
    settings, policy = task.rollout, task.policy
    tree = grow(settings, task.seed, iteration, share)
    shape = policy.latent_shape(task.size)
    sigmas = grid(policy, settings.schedule, settings.num_inference_steps, shape)
    uids = [record.uid for record in prompts]
    own = slice(share.start, share.stop)
    noise = KeyedNoise(
        task.seed, iteration, uids[own], shape, visits=visits(uids)[own], branch_scale=settings.branch_scale
    )
    roles, row_of_root = roles_of(settings, tree), tree.group[: tree.num_roots] + share.start
    if settings.hint_key is not None:  # the rows of the hinted prompts follow those of the prompts
        hints = policy.encode(
            [hinted(record, settings.hint_key) for record in prompts], negative=settings.guidance_scale != 1
        )
        conditions = Conditions.cat([conditions, hints])
        row_of_root = row_of_root + len(prompts) * (tree.source[: tree.num_roots] == SOURCES.index("hinted"))

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        rows = conditions.rows(row_of_root[root])
        return policy.velocity(
            x, sigma, rows, guidance_scale=settings.guidance_scale, detach_uncond=settings.detach_uncond
        )

    previews = Previews(lambda groups, latents: _judge(task, prompts, groups + share.start, latents))
    start, select = policy.start(noise.start(tree)), settings.plan.select(previews.score)
    guided = _guided(task, prompts, tree, share, noise)
    kernel = settings.kernel if guided is None else guided.kernel
    if len(roles) == 1:
        forest = roll(
            velocity, start, sigmas, tree, kernel, noise.step, micro_batch=settings.micro_batch, select=select
        )
    else:
        routed = by_source(velocity, policy, tree, roles, settings.micro_batch)
        forest = roll(routed, start, sigmas, tree, kernel, noise.step, select=select)
    if guided is not None:
        forest = guided.recorded(tree, forest)
    return forest if select is None else previews.on(forest)


def _guided(
    task: Task, prompts: Sequence[PromptRecord], tree: Tree, share: range, noise: KeyedNoise
) -> GuidedRollout | None:
    """What guides the rollout of this process's groups, if a reward's gradient does."""
    settings, guidance = task.rollout, task.rollout.reward_guidance
    if guidance is None:
        return None
    reward = guidance.judge(task.process_rewards)

    def batch(owner: Tensor, latents: Tensor, sigma: Tensor) -> RewardBatch:
        task.counts.reward_calls += len(latents)
        return decoded(task, prompts, owner, latents, reward.spec.inputs, sigma, grad=latents.requires_grad)

    return guidance.begin(
        settings.kernel, task.policy.path, reward, batch, tree.group[: tree.num_roots] + share.start,
        partial(noise.probes, tree), settings.micro_batch,
    )  # fmt: skip


def decoded(
    task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor, inputs: Sequence[str] = ("images",),
    sigma: Tensor | None = None, first: int = 0, grad: bool = False,
) -> RewardBatch:  # fmt: skip
    """Latents [n, *] of the groups `owner` [n] as a reward that reads `inputs` gets them, with what it may know of them.

    Decoded only if it reads images or videos, in parts of rollout.micro_batch. sigma [n]: their noise levels, 0 by default.
    first: number of the first sample. grad: see Policy.decode."""
    groups, fields = owner.tolist(), {}
    if set(inputs) & {"images", "videos"}:
        pixels = torch.cat([task.policy.decode(part, grad) for part in latents.split(task.rollout.micro_batch)])
        fields = pictures(pixels, task.fps)
        task.counts.decodes += len(latents)
    if "latents" in inputs:
        levels = torch.zeros(len(latents)) if sigma is None else sigma
        fields |= {"latents": latents, "sigma": levels.to(latents.device, torch.float32)}
    return RewardBatch(
        prompts=[prompts[group].prompt for group in groups],
        metadata=[prompts[group].metadata for group in groups],
        sample_ids=list(range(first, first + len(groups))),
        group_ids=groups,
        conditions=source_images([prompts[group] for group in groups], latents.device),
        **fields,
    )


def _judge(
    task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor, reward: Reward | None = None,
    sigma: Tensor | None = None,
) -> RewardOutput:  # fmt: skip
    """Scores latents [n, *] of the groups `owner` [n] (by the task's reward if no other is given), rollout.micro_batch at a
    time: one part is decoded, scored and freed before the next. What is not scoring in its time is decoding."""
    judge, size = reward or task.reward, task.rollout.micro_batch
    task.counts.reward_calls += len(latents)

    def parts() -> Iterator[RewardBatch]:
        for first in range(0, len(latents), size):
            rows = slice(first, first + size)
            levels = None if sigma is None else sigma[rows]
            yield decoded(task, prompts, owner[rows], latents[rows], judge.spec.inputs, levels, first)

    return score_chunks(judge, parts())


def _with_state_scores(task: Task, prompts: Sequence[PromptRecord], forest: Forest, first_group: int) -> Forest:
    """The forest with the scores of the task's process rewards at both ends of every stochastic step, by channel name.

    first_group: number, among `prompts`, of the group that is 0 in `forest`."""
    nodes = torch.cat([forest.tree.edges, forest.tree.parents_of_edges]).unique()
    for reward in task.process_rewards:
        owner, sigma = forest.tree.group[nodes] + first_group, forest.sigma(nodes)
        output = _judge(task, prompts, owner, forest.at(nodes), reward, sigma)
        for channel, column in zip(output.channels, output.scores.T, strict=True):
            forest = forest.with_scores(channel, _at(forest, nodes, column))
    return forest


def _with_uncertainty(forest: Forest, output: RewardOutput) -> Forest:
    """The forest with the uncertainty of its leaves' scores, by channel, for a weight of edges."""
    if output.uncertainty is None:
        return forest
    for channel, column in zip(output.channels, output.uncertainty.T, strict=True):
        forest = forest.with_scores(uncertainty_of(channel), _at(forest, forest.tree.leaves, column))
    return forest


def _at(forest: Forest, nodes: Tensor, values: Tensor) -> Tensor:
    """[N] `values` [n] at `nodes` [n], nan elsewhere."""
    return torch.full((len(forest.tree),), torch.nan).index_copy(0, nodes, values.float())
