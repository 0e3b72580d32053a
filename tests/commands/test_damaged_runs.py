"""A file of a run folder that is cut short, replaced or a folder: a sentence that names it, from every command that reads it."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flowalign import cli
from flowalign.run.run import Run
from tests.helpers.tiny_run import CONFIG, run_it


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)))


def other(file: Path) -> None:
    file.write_text('{"a": [1, null]}\n')


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


REPORTED = ("summary.json", "metrics.jsonl", "provenance.json", "grids/grids.json", "grids/held_out.png", "config.yaml")
HARMLESS = [
    ("provenance.json", other),
    ("grids/grids.json", other),
    ("metrics.jsonl", cut),
]  # nothing in them is read wrongly
HARMLESS += [("config.yaml", cut), ("config.yaml", other)]  # the report shows it as it is


@pytest.mark.parametrize("damage", [cut, garbage, other, folder])
@pytest.mark.parametrize("name", REPORTED)
def test_a_report_names_the_file_that_it_cannot_read(
    name: str, damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    code, printed = cli.report([str(run)]), capsys.readouterr().err
    if (name, damage) in HARMLESS:
        assert (code, printed) == (0, "")
    else:
        assert code in (1, 2) and name.rpartition("/")[2] in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("damage", [cut, garbage, other, folder])
@pytest.mark.parametrize(
    "name", ["config.yaml", "checkpoints/step-1/role_policy.safetensors", "checkpoints/step-1/manifest.json"]
)
def test_an_export_names_the_file_that_it_cannot_read(
    name: str, damage: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    assert cli.export([str(run)]) in (1, 2)
    printed = capsys.readouterr().err.strip()
    assert name.rpartition("/")[2] in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize("damage", [cut, garbage, other, folder])
@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "evaluation/base.safetensors", "metrics.jsonl"])
def test_a_run_that_cannot_go_on_says_so(
    name: str, damage: Callable[[Path], None], run: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Run, "finish", lambda self: {})
    damage(run / name)
    overrides: Sequence[str] = [f"policy.path={tiny_pipeline}", f"run.output={run.parent}", "run.iterations=1"]
    code, printed = cli.train([CONFIG, *overrides]), capsys.readouterr().err.strip().splitlines()
    if (name, damage) in HARMLESS[:1]:
        assert code == 0
    else:
        assert code in (1, 2) and name.rpartition("/")[2] in printed[-1]


def test_a_base_evaluation_of_another_run_is_refused(
    run: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_it(tiny_pipeline, tmp_path / "other", "run.iterations=1", "evaluation.seed=5")
    shutil.copy(tmp_path / "other" / "tiny" / "evaluation" / "base.safetensors", run / "evaluation")
    overrides = [f"policy.path={tiny_pipeline}", f"run.output={run.parent}", "run.iterations=1"]
    assert cli.train([CONFIG, *overrides]) == 2
    assert "base.safetensors is of another run" in capsys.readouterr().err
