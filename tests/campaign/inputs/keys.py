"""Misspelt and misplaced keys, parts that are turned off where none makes sense."""

from __future__ import annotations

from tests.campaign.case import Case

T, S = "trainer", "trainer.signal"


def key(override: str, says: str, *, fine: bool = False) -> Case:
    return Case(override, (override,), says=says, fine=fine)


CASES = [
    key("run.iteratons=3", "run.iterations"),
    key("run.itrations.more=3", "iterations"),
    key("runs.name=x", "run"),
    key("policy.lora.rnk=4", "rank"),
    key("policy.lorra.rank=4", "lora"),
    key("policy.lora={rank: 4, alfa: 8}", "alpha"),
    key("rollout.group_sise=4", "group_size"),
    key("rollout.plan.sise=2", "size"),
    key("rollout.plan.init_args.sise=2", "size"),
    key("rollout.plan.position={class_path: samplers.Sliding, init_args: {evry: 3}}", "every"),
    key("rollout.kernel.noise_lvl=0.3", "noise_level"),
    key("reward.metrik=edit", "quality|divide_by"),
    key("reward={class_path: rewards.OCR, init_args: {metrik: edit}}", "metric"),
    key("reward={class_path: rewards.OCR, init_arg: {metric: edit}}", "init_args"),
    key("reward={class: rewards.OCR}", "class_path"),
    key(f"{T}.optimizer.learning_rate=1e-3", "lr"),
    key(f"{T}.optimiser.lr=1e-3", "optimizer"),
    key(f"{T}.init_args.optimizer.lrr=1e-3", "lr"),
    key(f"{S}.advantge=flowalign.advantage.Normalized", "advantage"),
    key(f"{S}.advantage.wihtin=prompt", "within"),
    key(f"{S}.init_args.advantage=flowalign.advantage.Normalized", "init_args|advantage"),
    key(f"{T}.objective.clip_rnge=1e-3", "clip_range"),
    key(f"{T}.regularizers.kl.bta=1", "beta"),
    key(f"{T}.regularizers.kl.init_args.bta=1", "beta"),
    key("evaluation.num_steps=3", "num_inference_steps"),
    key("evaluation.rewards.name=x", "evaluation.rewards"),
    key("evaluation.prompt=x", "prompts"),
    key("policy.path.x=3", "policy.path"),
    key("class_path=x", "class_path"),
    key("=3", "key=value"),
    key("run.seed", "key=value|does not exist"),
    key("run.seed==3", "run.seed"),
    key("run..seed=3", "run"),
    key(".seed=3", "seed|key=value"),
    key(f"{T}.regularizers.kl=null", "", fine=True),
    key(f"{T}.dynamic_clip=null", "", fine=True),
    key("policy.lora={rank: 2, alpha: 2}", "", fine=True),
]
