"""A bf16 network rounds differently in other batch shapes: a run logs the drift and goes on; faults stop it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import dropout

from flowalign.build import policy_of, task_of
from flowalign.config import load_config
from flowalign.data import load_prompts
from flowalign.loop import train
from flowalign.rollouts.collect import ScoredRollout
from flowalign.storage.metrics_log import read_rows
from flowalign.trainers import PolicyGradient
from tests.helpers.policy_gradient import run_updates

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
BF16 = ["policy.dtype=bf16", "rollout.micro_batch=6", "trainer.micro_batch=1"]
CLIPPED = "trainer.objective={class_path: flowalign.objectives.ClippedRatio, init_args: {clip_range: 1.0e-4}}"
GUARD = "trainer.objective={class_path: flowalign.objectives.Guard, init_args: {clip_range: 2.0e-6}}"
CPS = "rollout.kernel={class_path: samplers.CPS, init_args: {constants: none}}"


@pytest.mark.parametrize("objective", [CLIPPED, GUARD], ids=["clipped", "guard"])
def test_rounding_above_the_clip_range_does_not_stop_a_run(tiny_pipeline: Path, tmp_path: Path, objective: str) -> None:
    overrides = [*BF16, objective, f"run.output={tmp_path}", "run.iterations=2", f"policy.path={tiny_pipeline}"]
    train(*load_config(TINY, overrides))
    for row in read_rows(tmp_path / "tiny" / "metrics.jsonl"):
        assert 2e-6 < row["ratio/drift_max"] < 5e-3
        assert row["optim/grad_norm"] > 0 and row["ratio/clip_fraction"] == 0


def rolled_out(*overrides: str) -> tuple[PolicyGradient, ScoredRollout]:
    config, _ = load_config(TINY, [*BF16, GUARD, "trainer.regularizers={}", *overrides])
    config.trainer.prepare(task_of(config, policy_of(config, "cpu")), None)
    return config.trainer, config.trainer.collect(load_prompts(config.prompts)[:2], 0)


def refuses(trainer: PolicyGradient, batch: ScoredRollout) -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"trainer\.max_drift=0\.01, more than rounding"):
        run_updates(trainer, batch)


def wrong_grid(policy, batch):
    sigmas = batch.forest.sigmas.clone()
    sigmas[1:-1] *= 0.95
    return replace(batch, forest=replace(batch.forest, sigmas=sigmas))


def active_dropout(policy, batch):
    (network,) = policy.modules().values()
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, out: (out[0], dropout(out[1], 0.1)))
    return batch


@pytest.mark.parametrize("kernel", ["rollout.kernel=samplers.FlowSDE", CPS], ids=["flow_sde", "cps"])
@pytest.mark.parametrize("fault", [None, wrong_grid, active_dropout])
def test_faults_are_told_from_rounding(tiny_pipeline: Path, kernel: str, fault) -> None:
    plan = "rollout.plan={class_path: samplers.Window, init_args: {size: 2, low: 0, high: 2}}"
    config, _ = load_config(
        TINY, [*BF16, f"policy.path={tiny_pipeline}", GUARD, kernel, plan, "trainer.regularizers={}"]
    )
    policy = policy_of(config, "cpu")
    config.trainer.prepare(task_of(config, policy), None)
    batch = config.trainer.collect(load_prompts(config.prompts)[:2], 0)
    if fault is None:
        run_updates(config.trainer, batch)
        return
    torch.manual_seed(0)
    with pytest.raises(
        RuntimeError, match=r"more than rounding.*trainer.max_drift|trainer.max_drift.*more than rounding"
    ):
        run_updates(config.trainer, fault(policy, batch))


@pytest.mark.parametrize(
    ("anchor", "clipped"), [("detach", (False, True)), ("rescore", (False, False)), ("stored", (True, True))]
)
def test_a_rollout_that_rounds_otherwise_clips_nothing_that_is_anchored(
    tiny_pipeline: Path, anchor: str, clipped: tuple[bool, bool]
) -> None:
    """As on a GPU: the rollout's velocities are off by 5e-4 of their size, in log-probs by more than the clip range of 1e-6. Rounding is a function of
    the batch, so the rescoring, in batches of the update, has none of it. The policy does not move between the updates."""
    config, _ = load_config(
        TINY, [f"policy.path={tiny_pipeline}", "trainer.regularizers={}", CLIPPED, "trainer.objective.clip_range=1.0e-6",
               "trainer.updates_per_rollout=2", "rollout.groups=4", f"trainer.anchor={anchor}"],
    )  # fmt: skip
    policy = policy_of(config, "cpu")
    velocity, generator = policy.velocity, torch.Generator().manual_seed(0)

    def rounded(*given, **more):
        v = velocity(*given, **more)
        return v * (1 + 5e-4 * torch.randn(v.shape, generator=generator))

    config.trainer.prepare(task_of(config, policy), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "velocity", rounded)
        batch = config.trainer.collect(load_prompts(config.prompts)[:4], 0)
    found = []
    for update in config.trainer.updates(batch):
        for micro_batch in update.micro_batches:
            micro_batch()
        found.append(update.after())
    assert found[0]["ratio/drift_max"] > 1e-6
    assert tuple(each["ratio/clip_fraction"] > 0 for each in found) == clipped
