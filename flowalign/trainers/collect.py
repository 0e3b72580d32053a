"""One rollout of one iteration, from prompts to scored leaves: shared by every trainer that samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.base import Conditions, encode_singly
from flowalign.trainers.base import Task
from flowalign.trainers.whole import survivors, whole_forest, whole_output
from rewards import RewardBatch, RewardOutput, score
from samplers import Forest, KeyedNoise, Look, Selected, Tree, rollout, sampled
from samplers.noise import generator, visits


@dataclass(frozen=True, eq=False)
class Collected:
    """A scored forest. `conditions` has one row per group; scores [L, C] and valid [L, C] follow `tree.leaves`."""

    forest: Forest
    conditions: Conditions
    output: RewardOutput
    scores: Tensor
    valid: Tensor
    channels: tuple[str, ...]
    iteration: int
    metrics: dict[str, float]
    uids: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        return len(self.scores)


def grow(task: Task, iteration: int, groups: range) -> Tree:
    """The topology of some groups of an iteration. Plans draw from the stream "select": a window is a function of the
    key, whoever rolls it out."""
    settings, trees = task.rollout, []
    for group in groups:
        drawn = group if settings.draw == "group" else 0
        rng = generator(task.seed, "select", iteration, drawn)
        trees.append(settings.plan.tree(settings.num_inference_steps, settings.group_size, iteration, rng))
    return Tree.cat(trees)


@torch.no_grad()
def collect(
    task: Task, prompts: Sequence[PromptRecord], iteration: int, *, keep_velocities: bool = False,
    roll: Callable[..., Forest] | None = None,
) -> Collected:  # fmt: skip
    """Rolls out `prompts` (one group each), decodes every leaf and scores it.

    A `Selected` plan keeps the states of which the previews (x̂0 of their velocities, which are not evaluated again) get
    the highest rewards. keep_velocities: the forest knows the rollout's own, as the role "old". roll: another engine
    with the arguments of `rollout`. Each process does whole groups, its share; what comes back is the batch of all."""
    settings, policy, processes = task.rollout, task.policy, task.processes
    share = processes.share(len(prompts))
    tree = grow(task, iteration, share)
    uids = [record.uid for record in prompts]
    shape = policy.latent_shape(task.height, task.width)
    sigmas = policy.sigmas(settings.num_inference_steps, shape)
    noise = KeyedNoise(
        task.seed, iteration, uids[share.start : share.stop], shape,
        visits=visits(uids)[share.start : share.stop], branch_scale=settings.branch_scale,
    )  # fmt: skip
    conditions = encode_singly(policy, [record.prompt for record in prompts])
    group_of_root = tree.group[: tree.num_roots] + share.start

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        rows = conditions.rows(group_of_root[root])
        return policy.velocity(x, sigma, rows, guidance_scale=settings.guidance_scale)

    def preview(tree: Tree, nodes: Tensor, x: Tensor, look: Look) -> Tensor:
        """The reward of what the states promise; a state that cannot be scored comes last."""
        sigma = sigmas[tree.index[nodes]]
        x0 = x if int(tree.index[nodes[0]]) == tree.num_steps else policy.path.x0_from_velocity(x, look(), sigma)
        output, _ = _judge(task, prompts, tree.group[nodes] + share.start, x0)
        return torch.where(output.valid, output.scores, torch.finfo(output.scores.dtype).min)

    began, rows_before = time.perf_counter(), policy.evaluations
    forest = (roll or rollout)(
        velocity, policy.start(noise.start(tree)), sigmas, tree, settings.kernel, noise.step,
        micro_batch=settings.micro_batch,
        select=settings.plan.by(preview) if isinstance(settings.plan, Selected) else None,
        keep_velocities=keep_velocities,
    )  # fmt: skip
    rolled, leaves = time.perf_counter(), forest.tree.leaves
    output, decoding = _judge(task, prompts, forest.tree.group[leaves] + share.start, forest.at(leaves))
    milliseconds = 1000 * output.elapsed / len(leaves)
    rows = processes.total(policy.evaluations - rows_before)
    if processes.count > 1:
        whole = survivors(processes, grow(task, iteration, range(len(prompts))), forest.tree)
        forest, output = whole_forest(processes, whole, forest), whole_output(processes, whole, output)
    metrics = {
        **_reward_metrics(task.reward.name, output, sampled(forest.tree)),
        "cost/rollout_per_image": rows / len(output.scores),
        "time/rollout": rolled - began,
        "time/decode": decoding,
        "time/reward": output.elapsed,
        "time/reward_ms_per_image": milliseconds,
    }
    return Collected(
        forest,
        conditions,
        output,
        output.scores[:, None],
        output.valid[:, None],
        (task.reward.name,),
        iteration,
        metrics,
        tuple(uids),
    )


def _judge(task: Task, prompts: Sequence[PromptRecord], owner: Tensor, latents: Tensor) -> tuple[RewardOutput, float]:
    """Decodes and scores latents of the groups `owner` [n]; also the seconds that decoding took."""
    began = time.perf_counter()
    images = torch.cat([task.policy.decode(part) for part in latents.split(task.rollout.micro_batch)])
    decoding = time.perf_counter() - began
    groups = owner.tolist()
    batch = RewardBatch(
        prompts=[prompts[group].prompt for group in groups],
        images=images,
        metadata=[prompts[group].metadata for group in groups],
        group_ids=groups,
    )
    return score(task.reward, batch), decoding


def _reward_metrics(name: str, output: RewardOutput, sample: Tensor) -> dict[str, float]:
    """Of the leaves `sample` [L] that end a sample: probes of noisier states would pull the curve down."""

    def mean(values: Tensor) -> float:
        values = values[sample]
        return float(values[values.isfinite()].double().mean()) if bool(values.isfinite().any()) else float("nan")

    ok = output.scores[output.valid & sample].double()
    return {
        "reward/mean": mean(output.scores),
        f"reward/{name}_mean": mean(output.scores),
        f"reward/{name}_std": float(ok.std(unbiased=False)) if len(ok) else float("nan"),
        "reward/invalid": float((~output.valid).sum()),
        **{f"reward/{name}.{part}_mean": mean(values) for part, values in output.components.items()},
    }
