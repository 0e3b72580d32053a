"""One rollout of one iteration, from prompts to scored leaves: shared by every trainer that samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowalign.credit.base import uncertainty_of
from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.rollouts.gather import Part, gather_forest, gather_output, gather_tree, joined
from flowalign.rollouts.guidance import measured
from flowalign.rollouts.judging import Judging
from flowalign.rollouts.metrics import cost_metrics, own_samples, process_metrics, reward_metrics
from flowalign.rollouts.rolling import Rolling, at_nodes, grow, leaves_per_group
from flowalign.rollouts.task import Rollout, Task, may_overlap
from flowalign.rollouts.tree_plot import plot_tree
from rewards import Reward, RewardOutput
from rewards.answers import at_rows, cat
from rewards.guard import MAX_FAIL_RATE, check_rate
from samplers import Forest, rollout, sampled


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


@torch.no_grad()
def collect(
    task: Task, prompts: Sequence[PromptRecord], iteration: int, *, keep_velocities: bool = False,
    roll: Callable[..., Forest] | None = None,
) -> ScoredRollout:  # fmt: skip
    """Rolls out `prompts` (one group each), decodes every leaf and scores it.

    keep_velocities: the forest keeps the rollout's own velocities, as the role "old". roll: another engine with the
    arguments of `rollout`. Each process rolls out whole groups, its share; what is returned is the batch of all.
    A reward that is elsewhere scores some groups while the next are rolled out, and with rollout.chunk any reward may (see
    rollout.overlap), unless the rollout asks rewards on its way itself (a plan that selects, reward guidance). Groups without the
    score of a leaf are rolled out again, with other noise, up to rollout.refill times."""
    processes, rows_before, before = task.processes, task.policy.evaluations, replace(task.counts)
    share = processes.groups(len(prompts))
    rolling = Rolling(task, prompts, iteration, roll or rollout, keep_velocities)
    forest, output, refilled = _scored(rolling, task, prompts, iteration, share)
    rows = processes.total(task.policy.evaluations - rows_before)
    spent = task.counts.since(before)
    decodes, calls = processes.total(spent.decodes), processes.total(spent.reward_calls)
    if processes.count > 1:
        planned = grow(task.rollout, task.seed, iteration, range(len(prompts)))
        tree = gather_tree(processes, planned, forest.tree)
        forest, output = gather_forest(processes, tree, forest), gather_output(processes, tree, output)
    forest = _with_uncertainty(forest, output)
    guidance = task.rollout.reward_guidance
    if guidance is not None:
        forest = guidance.replayed(forest, task.rollout.kernel, task.policy.path)
    metrics = {
        **reward_metrics(task.reward.name, output, own_samples(forest)),
        **cost_metrics(forest, output, rows, decodes, calls),
        **({"cost/refilled_groups": processes.total(refilled)} if task.rollout.refill else {}),
        **{f"time/{name}": seconds for name, seconds in rolling.seconds.items()},
        "time/reward": output.elapsed - rolling.seconds.get("reward_hidden", 0.0),
        "time/reward_ms_per_image": 1000 * output.elapsed / len(output.scores),
        **process_metrics(task.process_rewards, forest),
        **({} if guidance is None else measured(forest, processes)),
    }
    uids = tuple(record.uid for record in prompts)
    return ScoredRollout(
        forest, rolling.conditions, output.scores, output.valid, output.channels, iteration, metrics, uids
    )


def _scored(
    rolling: Rolling, task: Task, prompts: Sequence[PromptRecord], iteration: int, share: range
) -> tuple[Forest, RewardOutput, int]:
    """The forest of the groups `share`, the answer on its leaves, and how many groups were rolled out again."""
    parts, output = _attempt(rolling, task, prompts, _together(task.rollout, task.reward, share))
    refilled = 0
    for attempt in range(1, task.rollout.refill + 1):
        owner = torch.cat([part.owner for part in parts])
        failed = owner[~output.valid.all(1)].unique().tolist()
        if not failed:
            break
        again, more = _attempt(rolling, task, prompts, _together(task.rollout, task.reward, failed), attempt)
        kept = ~torch.isin(owner, torch.tensor(failed))
        parts = [part.without(failed) for part in parts] + again
        output = cat([at_rows(output, kept.nonzero().flatten()), more])
        refilled += len(failed)
    rolling.check_states()
    forest = parts[0].forest
    if len(parts) > 1:
        forest, order = joined(grow(task.rollout, task.seed, iteration, share), share, parts)
        output = at_rows(output, order)
    texts = [prompts[share[group]].prompt for group in forest.tree.group[forest.tree.leaves].tolist()]
    check_rate(task.reward.name, output, texts, list(range(len(texts))), MAX_FAIL_RATE)  # of what no refill could mend
    return forest, output, refilled


def _together(settings: Rollout, reward: Reward, groups: Sequence[int]) -> list[Sequence[int]]:
    """Groups in sets that are rolled out, decoded and scored at once: rollout.chunk each. If the reward is elsewhere, which scores
    one set while the next is rolled out, no more than make enough samples for rollout.micro_batch."""
    size = settings.chunk or max(1, len(groups))
    if reward.spec.elsewhere and not settings.asks_on_its_way:
        size = min(size, max(1, settings.micro_batch // sum(leaves_per_group(settings))))
    return [groups[first : first + size] for first in range(0, len(groups), size)]


def _attempt(
    rolling: Rolling, task: Task, prompts: Sequence[PromptRecord], together: Sequence[Sequence[int]], attempt: int = 0
) -> tuple[list[Part], RewardOutput]:
    """Sets of groups, rolled out one after the other, and the answer on all their leaves in this order, however many failed."""
    parts, settings = [], task.rollout
    beside = (
        len(together) > 1
        and (settings.overlap or rolling.device.type != "cpu")
        and may_overlap(settings, task.reward, task.process_rewards)
    )
    with Judging(task, prompts, task.reward, rolling.device, beside=beside) as judging:
        for groups in together:
            part = rolling.part(groups, attempt)
            judging.add(part.owner, part.forest.at(part.forest.tree.leaves))
            parts.append(part)
        output = judging.result(max_fail_rate=1.0)
    for name, seconds in judging.seconds(output.elapsed).items():
        rolling.seconds[name] += seconds
    return parts, output


def _with_uncertainty(forest: Forest, output: RewardOutput) -> Forest:
    """The forest with the uncertainty of its leaves' scores, by channel, for a weight of edges."""
    if output.uncertainty is None:
        return forest
    for channel, column in zip(output.channels, output.uncertainty.T, strict=True):
        forest = forest.with_scores(uncertainty_of(channel), at_nodes(forest, forest.tree.leaves, column))
    return forest
