"""One iteration of the policy gradient, run by tests/distributed in one process or in several.

`python -m tests.helpers.one_iteration PIPELINE OUTPUT window|selected replicated|sharded|checkpointed` writes
OUTPUT/<rank>.safetensors: gradients, start states, counts. sharded: the frozen weights are, as under FSDP2; checkpointed: and
their activations are computed again.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from flowalign.advantage import Normalized
from flowalign.data import PromptRecord
from flowalign.distributed import processes as distributed
from flowalign.distributed.fsdp2 import shard
from flowalign.distributed.processes import Processes
from flowalign.models import LoRA, Size, load_policy
from flowalign.objectives import ClippedRatio, Guard, KLPenalty
from flowalign.rollouts.guidance import Probing, RewardGuidance
from flowalign.rollouts.task import Rollout, Task
from flowalign.selectors import All, BestOfN, NonZeroAdvantage
from flowalign.trainers import PolicyGradient, Signal
from rewards import RewardOutput, RewardSpec
from samplers import Chain, FlowSDE, Selected, Window

WORDS = ["KITE", "MOON", "KITE", "LAMP", "ROSE"]  # five groups: two processes get two and three; one word comes twice
UIDS = [0, 1, 0, 2, 3]
# brightness: of a tiny pipeline's images of MOON one or more are below, and one or more above
DARK = {"window": 0.535, "selected": 0.5418}


@dataclass(frozen=True)
class Moody:
    """Brightness for the first words; the same for every image of LAMP and ROSE; no answer for the dark images of MOON.

    Uncertain by half of its score. Its component is there for some words only, so that one process has none."""

    dark: float
    name: str = "moody"
    spec = RewardSpec()

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch) -> RewardOutput:
        scores = batch.images.mean((1, 2, 3))
        dull = torch.tensor(["LAMP" in prompt or "ROSE" in prompt for prompt in batch.prompts])
        valid = torch.ones(len(scores), dtype=torch.bool)
        moons = torch.tensor(["MOON" in prompt for prompt in batch.prompts])
        valid[moons & (scores < self.dark)] = False
        parts = {"moon": torch.where(moons, scores, torch.nan)} if bool(moons.any()) else {}
        return RewardOutput(torch.where(dull, 0.5, scores), valid, parts, uncertainty=scores / 2)


@dataclass(frozen=True)
class Level:
    """A process reward: how far a state's mean is from σ."""

    name: str = "level"
    spec = RewardSpec(("latents",), "latent")

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch) -> RewardOutput:
        scores = batch.latents.mean((1, 2, 3)) - batch.sigma
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


PLANS = {
    "window": (Window(size=2, low=0, high=4), 4, ClippedRatio(1e-2)),
    # after three steps the better half of eight goes on; the guard reads the rollout's own velocities and replays the guidance
    "selected": (Selected(Chain(), {3: 4}), 8, Guard(1e-2)),
}
# the kept gradients of all processes make the guided means of every update
GUIDANCE = {"selected": RewardGuidance(Level(), spsa=Probing(), scale=3.0, log_prob_mean="guided")}


def count_messages() -> dict[str, int]:
    """Bytes that this process hands to the collective calls from now on, by their names."""
    sent = dict.fromkeys(("gather", "all_to_all", "all_reduce"), 0)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*tensors: Any) -> Any:
            sent[name] += tensors[name == "all_to_all"].nbytes
            return call(*tensors)

        return wrapped

    for name in sent:
        setattr(distributed, name, counted(name, getattr(distributed, name)))
    return sent


def run(pipeline: str, output: Path, plan: str, weights: str) -> None:
    accelerator = Accelerator(cpu=True)
    processes = Processes.of(accelerator)
    lora = LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2"))
    policy = load_policy(pipeline, lora=lora, gradient_checkpointing=weights == "checkpointed")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    if weights != "replicated":
        processes = shard(policy, processes)
    chosen, group_size, objective = PLANS[plan]
    trainer = PolicyGradient(
        Signal(Normalized(std="batch"), select=All([NonZeroAdvantage(), BestOfN(2)])),
        objective=objective, regularizers={"kl": KLPenalty(0.1)}, micro_batch=2,
    )  # fmt: skip
    settings = Rollout(
        chosen, FlowSDE(), groups=5, group_size=group_size, num_inference_steps=5, micro_batch=5,
        reward_guidance=GUIDANCE.get(plan),
    )  # fmt: skip
    trainer.prepare(Task(policy, Moody(DARK[plan]), settings, 0, Size(24, 48), processes, [Level()]), None)
    prompts = [
        PromptRecord(uid, f'the word "{word}" in red on a white background')
        for uid, word in zip(UIDS, WORDS, strict=True)
    ]
    before, sent = policy.evaluations, count_messages()
    batch = trainer.collect(prompts, 0)
    rolled, collected = policy.evaluations - before, sent["gather"]
    tree = batch.forest.tree
    trained = tree.edges[trainer.edge_signal(batch).chosen]
    for update in trainer.updates(batch):
        for micro_batch in update.micro_batches:
            accelerator.backward(micro_batch())
        processes.sum_gradients(parameter for _, parameter in policy.trainable_parameters())
        metrics = {**batch.metrics, **update.after()}
    found = {name: p.grad for name, p in policy.trainable_parameters() if p.grad is not None}
    forest, messages = batch.forest, [collected, sent["gather"] - collected, sent["all_to_all"], sent["all_reduce"]]

    def everyones(nodes: torch.Tensor) -> torch.Tensor:
        """The states of `nodes`, each from the process that rolled it out."""
        own = nodes[forest.row[nodes] >= 0]
        return processes.gather(forest.at(own))[processes.gather(own).argsort()]

    save_file(
        {
            **found,
            "roots": everyones(torch.arange(forest.tree.num_roots)),
            "leaves": everyones(forest.tree.leaves),
            "scores": batch.scores,
            "valid": batch.valid,
            "state_scores": forest.scores["level"],
            "uncertainty": batch.uncertainty,
            "messages": torch.tensor(messages),
            "trained": torch.stack([trained, tree.parent[trained], tree.group[trained]]),
            "group": tree.group,
            "group_of_leaf": tree.group[tree.leaves],
            "condition": torch.tensor(sum(rows[:1].nbytes for rows in batch.conditions.tensors.values())),
            "held": torch.tensor([len(forest.states), int(forest.kept.sum())]),
            "rows": torch.tensor([rolled, update.micro_batches and len(update.micro_batches)]),
        },
        output / f"{processes.rank}.safetensors",
        metadata={name: repr(value) for name, value in metrics.items() if not name.startswith("time/")},
    )
    accelerator.end_training()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    os._exit(0)  # torch's threads sometimes abort the interpreter's own way out, after all is done
