"""Numbers that are not finite, out of range, of another type, or too large for any machine."""

from __future__ import annotations

from tests.campaign.case import Case

T = "trainer"
FLOATS = [
    f"{T}.optimizer.lr", f"{T}.optimizer.weight_decay", f"{T}.optimizer.eps", f"{T}.optimizer.max_grad_norm",
    f"{T}.objective.clip_range", f"{T}.regularizers.kl.beta", f"{T}.max_drift", f"{T}.signal.advantage.delta",
    f"{T}.signal.advantage.clip", f"{T}.signal.advantage.trim", "policy.lora.alpha", "policy.lora.dropout", "policy.fps",
    "reward.divide_by", "rollout.kernel.noise_level", "rollout.kernel.sigma_cap", "rollout.branch_scale",
    "rollout.guidance_scale", "evaluation.guidance_scale", "run.ema_decay",
]  # fmt: skip
WHOLE = {
    f"{T}.optimizer.betas": "[0.9, .nan]",
    f"{T}.dynamic_clip": "{low: .nan, high: 2.0e-4, sensitivity: 4.0}",
    f"{T}.step_weight": "{class_path: flowalign.objectives.Certainty, init_args: {scale: .nan}}",
    "reward": "{class_path: rewards.Mix, init_args: {rewards: [rewards.JPEGCompressibility], weights: [.nan]}}",
    "evaluation.rewards": "[{class_path: rewards.JPEGCompressibility, init_args: {divide_by: .nan}}]",
    "rollout.schedule": "{class_path: samplers.PlainShift, init_args: {k: .nan}}",
    "policy.roles": "{slow: {update: ema, decay: .nan}}",
}
SIZES = [
    "rollout.group_size", "rollout.groups", "rollout.num_inference_steps", "policy.height", "policy.width",
    "policy.lora.rank", "evaluation.num_inference_steps", "evaluation.samples_per_prompt",
]  # fmt: skip


def refused(key: str, value: str, says: str | None = None) -> Case:
    return Case(
        f"{key}={value}", (f"{key}={value}",), says=key.rpartition(".")[2] if says is None else says, seconds=60
    )


CASES = [
    *(refused(key, ".nan") for key in FLOATS),
    *(refused(key, value) for key in FLOATS for value in (".inf", "-.inf")),
    *(refused(key, value, "") for key, value in WHOLE.items()),
    *(refused(key, "1000000000") for key in SIZES),
    *(refused(key, "0") for key in SIZES if key != "policy.lora.rank"),
    *(refused(key, "-1") for key in SIZES),
    *(refused(key, "many") for key in SIZES[:4]),
    refused("policy.height", "25"),
    refused("run.seed", "-1"),
    refused("run.seed", "18446744073709551616"),
    refused("run.seed", "1.5"),
    refused("run.iterations", "true"),
    refused("run.iterations", "1e3"),
    refused("run.checkpoint_every", "0"),
    refused("run.keep_checkpoints", "0"),
    refused("run.ema_decay", "1.0"),
    refused("evaluation.count", "100000"),
    refused("evaluation.count", "0"),
    refused("evaluation.batch_size", "0"),
    refused("evaluation.every", "0"),
    refused("policy.decode_batch", "0"),
    refused(f"{T}.micro_batch", "0"),
    refused(f"{T}.updates_per_rollout", "3", "updates_per_rollout"),
    refused(f"{T}.optimizer.lr", "0"),
    refused(f"{T}.optimizer.lr", "fast"),
    refused(f"{T}.optimizer.betas", "[0.9]"),
    refused(f"{T}.optimizer.betas", "[0.9, 2]"),
    refused(f"{T}.objective.clip_range", "-1"),
    refused("rollout.plan.size", "9", "size|window"),
    refused("rollout.kernel.noise_level", "0", "noise"),
    refused(f"{T}.optimizer.lr", "1e30", ""),  # the weights overflow: stopped, and nothing of it is saved
    Case("a float without a dot", (f"{T}.optimizer.lr=1e-4",), fine=True),
]
