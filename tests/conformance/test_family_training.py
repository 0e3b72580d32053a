"""Every model family trains: one iteration of each kind of method, a noise optimization, a resumed run, the doctor."""

from collections.abc import Callable, Set
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flowalign as fa
from flowalign.diagnostics.doctor import diagnose
from flowalign.models.checks import rows_per_state
from flowalign.run.run import Run
from flowalign.trainers import Batch
from tests.helpers import tiny_run
from tests.helpers.families import Subject
from tests.helpers.family_run import (
    CONFIG,
    SMALL,
    arguments,
    reward_of,
    sampling_of,
    scale_of,
    shaken,
    stochastic,
    trained,
    velocity,
)

Note = Callable[..., None]


def moved(family: Subject, weights: dict[str, Tensor]) -> list[str]:
    """The names of the policy's tensors that differ from those that a run starts with."""
    begin = dict(family.policy(lora=SMALL).trainable_parameters())
    assert begin.keys() == weights.keys()
    return [name for name, start in begin.items() if not torch.equal(weights[name], start)]


@torch.no_grad()
def without_effect(family: Subject, names: Set[str]) -> bool:
    """Whether these tensors of the LoRA can be anything without a bit of the velocity changing, as those of the last block that lead
    only to its text, which nothing reads."""
    policy = shaken(family.policy(lora=SMALL))
    before = velocity(family, policy, 1.0)
    for name, parameter in policy.trainable_parameters():
        if name in names:
            parameter.normal_()
    return torch.equal(velocity(family, policy, 1.0), before)


def test_an_iteration_of_flow_grpo_moves_every_parameter(family: Subject, note: Note, tmp_path: Path) -> None:
    """But for those without effect. Two updates: the gradient of A is 0 as long as B is. Every state of the rollout is computed once, and once more, with a backward,
    by the update; those of the second update once before the first, for their ratio.

    Source images take seconds to encode, so guidance, which encodes them again, is left to the slow tests."""
    guidance = 1.0 if family.family.source_images[0] else scale_of(family)
    rows = rows_per_state(family.folder, guidance)
    scales = [f"{section}.guidance_scale={guidance}" for section in ("rollout", "evaluation")]
    row, weights = trained(family, tmp_path, stochastic(family), *scales)
    steps, stochastic_steps = 3, 2
    assert row["cost/rollout_per_image"] == steps * rows
    assert row["cost/update_per_image"] == (2 + 0.5) * stochastic_steps * rows
    assert row["group/trained_edges"] == 2 * 2 * stochastic_steps and row["group/zero_std_ratio"] == 0
    assert row["ratio/drift_max"] <= 1e-6 and row["optim/grad_norm"] > 0
    changed = moved(family, weights)
    assert len(changed) > 0.8 * len(weights) and without_effect(family, weights.keys() - set(changed))
    note("evaluations per image, rollout", row["cost/rollout_per_image"])
    note("evaluations per image, update", row["cost/update_per_image"])
    note("log ratio of an unchanged policy", row["ratio/drift_max"])
    note("tensors moved", f"{len(changed)} of {len(weights)}")


@pytest.mark.slow
def test_an_iteration_of_a_tree(family: Subject, note: Note, tmp_path: Path) -> None:
    """As BranchGRPO: a root, its two children and their four, each computed once for four images."""
    row, _ = trained(
        family, tmp_path, stochastic(family), "rollout.group_size=4", "rollout.branch_scale=4.0",
        "rollout.plan={class_path: samplers.SplitTree, init_args: {splits: [0, 1]}}",
        "trainer.signal.credit=flowalign.credit.SubtreeFusion",
        "trainer.signal.advantage={class_path: flowalign.advantage.Normalized, init_args: {within: tree_depth, std: set}}",
    )  # fmt: skip
    assert row["cost/rollout_per_image"] == (1 + 2 + 4) / 4 * rows_per_state(family.folder, scale_of(family))
    assert row["group/trained_edges"] == 2 * (2 + 4)
    assert row["ratio/drift_max"] <= 1e-6 and row["optim/grad_norm"] > 0
    note("tree", row["ratio/drift_max"])


@pytest.mark.slow
def test_an_iteration_of_a_forward_process(family: Subject, note: Note, tmp_path: Path) -> None:
    """DiffusionNFT, after whose first update the policy has left its lagging average."""
    small = ["rollout.group_size=2", "rollout.guidance_scale=1", "trainer.draws=2", "trainer.optimizer.weight_decay=0"]
    row, weights = trained(family, tmp_path, *small, layers=["methods/nft.yaml"])
    assert row["cost/rollout_per_image"] == 3 * rows_per_state(family.folder, 1.0)
    assert row["optim/grad_norm"] > 0 and any(".lora_B." in name for name in moved(family, weights))
    note("forward process")


@pytest.mark.slow
def test_start_noise_follows_the_gradient_of_a_reward(family: Subject, note: Note) -> None:
    policy, sampling = family.policy(trainable="none"), sampling_of(family)
    found = fa.optimize_noise(
        policy, family.records(1), reward_of(family), steps=3, size=sampling.size, fps=sampling.fps, progress=False,
        num_inference_steps=sampling.num_inference_steps, guidance_scale=sampling.guidance_scale,
    )  # fmt: skip
    assert found.evaluations == 3 * 2 * policy.rows_per_state(sampling.guidance_scale) and found.decoded == 3
    assert bool(found.history["total"].isfinite().all()) and bool((found.total >= found.first_total).all())
    assert len(found.history["total"].unique()) == 3  # each step made another image
    note("noise optimization")


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    family: Subject, note: Note, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [stochastic(family), "run.iterations=2"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    trained(family, tmp_path / "whole", *settings)
    original = Run.end

    def killed(self: Run, iteration: int, batch: Batch) -> None:
        original(self, iteration, batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(family, tmp_path / "killed", *settings)
    trained(family, tmp_path / "killed", *settings)
    (tensors, state, rows), (others, other_state, other_rows) = (
        tiny_run.result(tmp_path / name) for name in ("whole", "killed")
    )
    assert len(rows) == 2 and rows == other_rows and state == other_state
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    note("resume")


@pytest.mark.slow
def test_the_doctor_finds_nothing(family: Subject, note: Note, tmp_path: Path) -> None:
    findings = list(diagnose(CONFIG, [*arguments(family, tmp_path), stochastic(family)]))
    assert [str(finding) for finding in findings if finding.ok is not True] == []
    note("doctor")
