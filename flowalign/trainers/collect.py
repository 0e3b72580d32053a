"""One rollout of one iteration, from prompts to scored leaves: shared by every trainer that samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.base import Conditions, encode_singly
from flowalign.trainers.base import Task
from rewards import RewardBatch, RewardOutput, score
from samplers import Forest, KeyedNoise, Tree, rollout
from samplers.noise import generator


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

    @property
    def images(self) -> int:
        return len(self.scores)


def grow(task: Task, iteration: int, groups: int) -> Tree:
    """The topology of an iteration. Plans draw from the stream "select", so a window is a function of the key."""
    settings, trees = task.rollout, []
    for group in range(groups):
        drawn = group if settings.draw == "group" else 0
        rng = generator(task.seed, "select", iteration, drawn)
        trees.append(settings.plan.tree(settings.num_inference_steps, settings.group_size, iteration, rng))
    return Tree.cat(trees)


@torch.no_grad()
def collect(task: Task, prompts: Sequence[PromptRecord], iteration: int) -> Collected:
    """Rolls out `prompts` (one group each), decodes every leaf and scores it."""
    settings, policy = task.rollout, task.policy
    tree = grow(task, iteration, len(prompts))
    noise = KeyedNoise(
        task.seed, iteration, [record.uid for record in prompts], policy.latent_shape(task.height, task.width)
    )
    conditions = encode_singly(policy, [record.prompt for record in prompts])
    group_of_root = tree.group[: tree.num_roots]

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        rows = conditions.rows(group_of_root[root])
        return policy.velocity(x, sigma, rows, guidance_scale=settings.guidance_scale)

    began, rows_before = time.perf_counter(), policy.evaluations
    forest = rollout(
        velocity, policy.start(noise.start(tree)), policy.sigmas(settings.num_inference_steps), tree,
        settings.kernel, noise.step, micro_batch=settings.micro_batch,
    )  # fmt: skip
    rolled = time.perf_counter()
    leaves = forest.at(tree.leaves).split(settings.micro_batch)
    images = torch.cat([policy.decode(part) for part in leaves])
    decoded = time.perf_counter()
    owner = tree.group[tree.leaves].tolist()
    output = score(
        task.reward,
        RewardBatch(
            prompts=[prompts[group].prompt for group in owner],
            images=images,
            metadata=[prompts[group].metadata for group in owner],
            group_ids=owner,
        ),
    )
    metrics = {
        **_reward_metrics(task.reward.name, output),
        "cost/rollout_per_image": (policy.evaluations - rows_before) / len(owner),
        "time/rollout": rolled - began,
        "time/decode": decoded - rolled,
        "time/reward": output.elapsed,
        "time/reward_ms_per_image": 1000 * output.elapsed / len(owner),
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
    )


def _reward_metrics(name: str, output: RewardOutput) -> dict[str, float]:
    def mean(values: Tensor) -> float:
        return float(values[values.isfinite()].double().mean()) if bool(values.isfinite().any()) else float("nan")

    ok = output.scores[output.valid].double()
    return {
        "reward/mean": mean(output.scores),
        f"reward/{name}_mean": mean(output.scores),
        f"reward/{name}_std": float(ok.std(unbiased=False)) if len(ok) else float("nan"),
        "reward/invalid": float((~output.valid).sum()),
        **{f"reward/{name}.{part}_mean": mean(values) for part, values in output.components.items()},
    }
