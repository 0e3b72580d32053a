"""A run on a tiny real pipeline: it moves weights, resumes bit for bit from any kill, and exports its LoRA."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from flowalign.errors import ConfigError
from flowalign.models import LoRA, load_policy
from flowalign.run.interrupt import Interrupted
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows
from flowalign.trainers import Update
from tests.helpers.tiny_run import result, run_it


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def uninterrupted(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three iterations with EMA."""
    output = tmp_path_factory.mktemp("uninterrupted")
    run_it(tiny_pipeline, output, "run.ema_decay=0.5")
    return output


def test_a_run_writes_summary_rows_and_report(uninterrupted: Path) -> None:
    folder = uninterrupted / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"base", "tuned", "gain_ci95", "seconds", "evaluations_per_image", "ratio_drift_max"} <= summary.keys()
    assert summary["ratio_drift_max"] <= 1e-6  # I1
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["optim/grad_norm"] > 0 and "ratio/drift_max" in row for row in rows)
    report = (folder / "report.html").read_text()
    assert report.count('alt="tree of one rollout"') == report.count('aria-label="reward curves"') == 1
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_every_adapter_parameter_moves(uninterrupted: Path, tiny_pipeline: Path) -> None:
    lora = LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2"))
    start = dict(load_policy(str(tiny_pipeline), lora=lora, seed=0).trainable_parameters())
    tensors, _, _ = result(uninterrupted)
    moved = [not torch.equal(tensors[f"role_policy/{name}"], value) for name, value in start.items()]
    assert len(moved) == 12 and all(moved)


POINTS = {  # where the run is killed: at which call of what; a checkpoint has three sections
    "rollout": ("flowalign.rollouts.collect.rollout", 2),
    "reward": ("rewards.scoring.score", 2),
    "backward": ("flowalign.run.run.Run.backward", 2),
    "optimizer": ("flowalign.run.run.Run.step", 2),
    "ema": ("flowalign.models.ema.EMA.update", 2),
    "first metrics append": ("flowalign.storage.metrics_log.append_line", 1),
    "first temporary write": ("flowalign.storage.checkpoint.save_file", 1),
    "temporary write": ("flowalign.storage.checkpoint.save_file", 4),
    "last prune": ("shutil.rmtree", 2),
    "metrics append": ("flowalign.storage.metrics_log.append_line", 2),
    "evaluation": ("flowalign.run.evaluations.append_result", 2),
}


@pytest.mark.parametrize("point", POINTS)
def test_resume_after_a_kill_is_bit_exact(
    point: str, uninterrupted: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, call = POINTS[point]
    owner, name = target.rsplit(".", 1)
    holder = pytest.importorskip(owner) if not owner.endswith(("Run", "EMA")) else None
    if holder is None:
        module, cls = owner.rsplit(".", 1)
        holder = vars(sys.modules[module])[cls]
    original, seen = vars(holder)[name], []

    def dies(*args, **kwargs):
        seen.append(1)
        if len(seen) == call:
            raise Killed(point)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, dies)
        with pytest.raises(Killed):
            run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5", "run.keep_checkpoints=1")
    run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5", "run.keep_checkpoints=1")
    (tensors, state, rows), (expected, expected_state, expected_rows) = result(tmp_path), result(uninterrupted)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert state == expected_state
    assert rows == expected_rows
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-3"]


def test_ctrl_c_finishes_the_iteration_and_saves(
    tiny_pipeline: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.backward

    def interrupted(self: Run, loss: torch.Tensor, update: Update) -> None:
        os.kill(os.getpid(), 2)
        original(self, loss, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "backward", interrupted)
        with pytest.raises(Interrupted, match="iteration 1"):
            run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5", "run.checkpoint_every=3")
    assert checkpoint.latest(tmp_path / "tiny").name == "step-1"
    run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5", "run.checkpoint_every=3")
    assert all(torch.equal(value, result(uninterrupted)[0][name]) for name, value in result(tmp_path)[0].items())


def test_another_configuration_does_not_resume(uninterrupted: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        run_it(tiny_pipeline, uninterrupted, "run.ema_decay=0.5", "rollout.group_size=4")


def test_micro_batches_do_not_change_the_trajectory(uninterrupted: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5", "trainer.micro_batch=1", "rollout.micro_batch=1")
    tensors, expected = result(tmp_path)[0], result(uninterrupted)[0]
    for name, value in expected.items():
        if name.startswith("role_policy/"):
            torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=2e-5)
