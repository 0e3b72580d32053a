"""What trackers get: rows, images during training, the gains at the end; one W&B run however often a run resumes."""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowalign.config import RunSettings
from flowalign.run.trackers import Trackers
from flowalign.storage.files import DamagedFile
from tests.helpers.tiny_run import run_it


def test_tensorboard_gets_images_of_each_evaluation_and_the_gains(tiny_pipeline: Path, tmp_path: Path) -> None:
    summary = run_it(
        tiny_pipeline,
        tmp_path,
        "run.trackers=[tensorboard]",
        "run.project=mine",
        "evaluation.every=1",
        "run.iterations=2",
    )
    log = EventAccumulator(str(tmp_path / "tiny" / "logs" / "mine"))
    log.Reload()
    [image] = log.Images("eval/base_tuned")
    assert (image.step, image.height, image.width) == (1, 24, 4 * 2 * 48)  # four pairs side by side
    gains = {tag: log.Scalars(tag) for tag in log.Tags()["scalars"] if tag.startswith("final/")}
    assert {tag.split("/")[1] for tag in gains} == {"base", "tuned", "gain", "gain_ci95_low", "gain_ci95_high"}
    [gain] = gains[f"final/gain/{summary['reward']}"]
    assert gain.step == 2 and gain.value == struct.unpack("f", struct.pack("f", summary["gain"]))[0]


class Asked:
    """An accelerator that notes how its trackers were started."""

    is_main_process = True

    def init_trackers(self, project: str, init_kwargs: dict[str, Any]) -> None:
        self.project, self.options = project, init_kwargs


def started(folder: Path, **settings: Any) -> SimpleNamespace:
    accelerator: Any = Asked()
    Trackers.of(accelerator, RunSettings("tiny", **settings), folder)
    return SimpleNamespace(project=accelerator.project, **accelerator.options.get("wandb", {}))


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(folders: Path) -> None:
    settings = {"trackers": ["wandb"], "project": "mine", "tags": ["wide", "seed 3"]}
    first, again, other = (started(folders / name, **settings) for name in ("one", "one", "two"))
    assert (first.project, first.name, first.tags, first.resume) == ("mine", "tiny", ["wide", "seed 3"], "allow")
    assert first.id == again.id != other.id
    assert not (folders / "two" / "wandb_id.txt").samefile(folders / "one" / "wandb_id.txt")


def test_an_id_that_is_lost_is_said(folders: Path) -> None:
    (folders / "one" / "wandb_id.txt").write_text("")
    with pytest.raises(DamagedFile, match="remove it to begin another run"):
        started(folders / "one", trackers=["wandb"])
    assert vars(started(folders / "one")) == {"project": "flowalign"}  # without W&B it is not read
