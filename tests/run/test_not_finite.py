"""Numbers that are not finite: never in a checkpoint, and blamed on what made them so."""

from pathlib import Path

import pytest
import torch

from flowalign.errors import RunError
from flowalign.models.ema import EMA
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import CheckpointError
from flowalign.trainers import Batch, Update
from tests.helpers.tiny_run import run_it


def spoil(run: Run) -> None:
    """One entry of the first trained weight, as an optimizer with a setting that is not a number would."""
    _, parameter = run.task.policy.parameters_of("policy")[0]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan


def test_an_average_that_is_not_finite_is_not_saved_and_the_checkpoint_before_stands(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = EMA.tensors

    def spoiled(self: EMA) -> dict[str, torch.Tensor]:
        tensors = original(self)
        if checkpoint.steps(tmp_path / "tiny"):
            first = next(iter(tensors))
            tensors[first] = torch.full_like(tensors[first], torch.inf)
        return tensors

    monkeypatch.setattr(EMA, "tensors", spoiled)
    with pytest.raises(CheckpointError, match=r"got ema, .*lora_A.* not finite; .* nothing was saved at step 2"):
        run_it(tiny_pipeline, tmp_path, "run.ema_decay=0.5")
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-1"]
    checkpoint.load(checkpoint.latest(tmp_path / "tiny"))


def test_weights_that_an_update_spoiled_are_named_before_the_next_rollout(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.end

    def spoiling(self: Run, iteration: int, batch: Batch) -> None:
        spoil(self)
        original(self, iteration, batch)

    monkeypatch.setattr(Run, "end", spoiling)
    with pytest.raises(
        RunError, match=r"got the weight .*lora_A.* an update made them so: lower trainer\.optimizer\.lr"
    ):
        run_it(tiny_pipeline, tmp_path)
    assert checkpoint.latest(tmp_path / "tiny") is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (True, "got the weight .*an update made them so"),
        (False, "got loss nan of policy from finite weights and scores"),
    ],
)
def test_a_loss_that_is_not_finite_is_blamed_on_the_weights_only_if_they_are_not(
    weights: bool, message: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.backward

    def spoiled(self: Run, loss: torch.Tensor, update: Update) -> None:
        if weights:
            spoil(self)
        original(self, loss * torch.nan, update)

    monkeypatch.setattr(Run, "backward", spoiled)
    with pytest.raises(RunError, match=message):
        run_it(tiny_pipeline, tmp_path)
