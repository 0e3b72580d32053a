"""run.max_evaluations and run.max_seconds end a run early, at the same iteration however often it was stopped."""

import json
import signal
from pathlib import Path

import pytest
import torch

from flowalign.config import RunSettings
from flowalign.run.checkpoints import Progress
from flowalign.run.interrupt import Interrupted
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows
from tests.helpers.stopping import stopping_in
from tests.helpers.tiny_run import result, run_it

LONG = ("run.iterations=9", "evaluation.every=1")


def cost_of_one(row: dict) -> float:
    return row["cost/images"] * (row["cost/rollout_per_image"] + row["cost/update_per_image"])


@pytest.mark.parametrize(("limit", "expected"), [(10.0, False), (9.0, False), (8.9, True), (6.0, True), (5.0, True)])
def test_spent_is_when_one_more_of_the_mean_goes_beyond(limit: float, expected: bool) -> None:
    progress = Progress(training=100.0)
    progress.totals |= {"rollout": 4.0, "update": 2.0}  # two iterations of 3
    assert progress.is_spent(2, RunSettings("x", max_evaluations=limit)) is expected  # type: ignore[arg-type]
    assert progress.is_spent(2, RunSettings("x", max_seconds=149.0)) and not progress.is_spent(2, RunSettings("x"))


def test_a_run_ends_at_its_evaluations_like_a_run_of_so_many_iterations(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_it(tiny_pipeline, tmp_path / "plain", "run.iterations=3")
    costs = [cost_of_one(row) for row in read_rows(tmp_path / "plain" / "tiny" / "metrics.jsonl")]
    limit = f"run.max_evaluations={int(sum(costs) + min(costs) / 2)}"
    summary = run_it(tiny_pipeline, tmp_path / "limited", limit, *LONG)
    (tensors, state, _), (expected, expected_state, _) = result(tmp_path / "limited"), result(tmp_path / "plain")
    assert summary["iterations"] == 3 and "gain" in summary and state == expected_state
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    rows = read_rows(tmp_path / "limited" / "tiny" / "evaluations.jsonl")
    labels = ["base", "on the way", "on the way", "tuned"]  # no evaluation on the way where the run ends
    assert [(row["step"], row["label"]) for row in rows] == list(enumerate(labels))

    with monkeypatch.context() as patch:
        stopping_in(1, signal.SIGINT, patch)
        with pytest.raises(Interrupted):
            run_it(tiny_pipeline, tmp_path / "resumed", limit, *LONG)
    run_it(tiny_pipeline, tmp_path / "resumed", limit, *LONG)
    tensors, state, metrics = result(tmp_path / "resumed")
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert [state, metrics] == [*result(tmp_path / "limited")[1:]]

    run_it(tiny_pipeline, tmp_path / "resumed", limit, *LONG)  # again: it is at its end
    assert result(tmp_path / "resumed")[2] == metrics
    run_it(tiny_pipeline, tmp_path / "resumed", f"run.max_evaluations={10**9}", "run.iterations=4")  # a longer one
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "resumed" / "tiny")) == 4


def test_a_run_ends_at_its_seconds_but_not_before_one_iteration(tiny_pipeline: Path, tmp_path: Path) -> None:
    run_it(tiny_pipeline, tmp_path, "run.max_seconds=0.001", *LONG)
    folder = tmp_path / "tiny"
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 1
    assert (folder / "trees" / "iteration-1.png").exists() and (folder / "checkpoints").is_dir()
    run_it(tiny_pipeline, tmp_path, "run.max_seconds=0.001", *LONG)
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("key", ["max_evaluations", "max_seconds"])
def test_a_limit_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"run\.{key}=0: expected more than 0, or null"):
        RunSettings("x", **{key: 0})
