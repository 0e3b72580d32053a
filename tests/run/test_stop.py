"""A run that is stopped leaves its LoRA and a report as far as it came, and goes on from there."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign.run.interrupt import Interrupted
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.trainers import Batch
from tests.helpers.stopping import stopping_in
from tests.helpers.tiny_run import result, run_it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_lora_and_report_as_far_as_it_came(
    number: int, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_in(1, number, monkeypatch)
    with pytest.raises(Interrupted, match=r"iteration 2 of 3, without an evaluation.*report\.html, .*lora") as stopped:
        run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5")
    folder = tmp_path / "tiny"
    assert str(folder / "lora") in str(stopped.value)
    page, summary = (folder / "report.html").read_text(), json.loads((folder / "summary.json").read_text())
    assert "load_lora_weights" in page and 'aria-label="reward curves"' in page
    assert summary["iterations"] == 2 and "gain" not in summary
    tensors, _ = checkpoint.load(checkpoint.latest(folder))
    saved = load_file(folder / "lora" / "adapter_model.safetensors")
    for name, average in tensors["ema"].items():  # the average is what would be evaluated
        assert torch.equal(saved[f"base_model.model.{name}".replace(".default", "")], average)


def test_a_stop_changes_nothing_of_what_follows(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_it(tiny_pipeline, tmp_path / "one", "run.ema_decay=0.5")
    with monkeypatch.context() as patch:
        stopping_in(0, signal.SIGINT, patch)
        with pytest.raises(Interrupted):
            run_it(tiny_pipeline, tmp_path / "two", "run.ema_decay=0.5")
    run_it(tiny_pipeline, tmp_path / "two", "run.ema_decay=0.5")
    (tensors, state, rows), (expected, *others) = result(tmp_path / "two"), result(tmp_path / "one")
    assert all(torch.equal(tensors[name], value) for name, value in expected.items()) and [state, rows] == others
    assert "gain" in json.loads((tmp_path / "two" / "tiny" / "summary.json").read_text())


def test_a_relative_run_folder_is_absolute_and_a_tilde_is_the_home(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that changes the working directory does not move the run."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    original = Run.end

    def moving(self: Run, current: int, batch: Batch) -> None:
        os.chdir(tmp_path / "elsewhere")
        original(self, current, batch)

    monkeypatch.setattr(Run, "end", moving)
    run_it(tiny_pipeline, Path("here"), "run.iterations=1")
    assert (tmp_path / "here" / "tiny" / "report.html").exists() and not list((tmp_path / "elsewhere").iterdir())
    run_it(tiny_pipeline, Path("~/there"), "run.iterations=1")
    assert (tmp_path / "home" / "there" / "tiny" / "lora").is_dir()
