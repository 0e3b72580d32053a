"""rollout.schedule and evaluation.schedule, from YAML to the rollout, the evaluation and the exported call."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign.config import evaluation_schedule, load_config
from flowalign.errors import ConfigError
from flowalign.report.html import load_snippet
from flowalign.storage.checkpoint import latest
from samplers import FamilyGrid, PlainShift
from tests.helpers.tiny import tiny_sd15
from tests.helpers.tiny_run import CONFIG, run_it

SHIFT = 'rollout.schedule={"class_path":"samplers.PlainShift","init_args":{"k":2.0}}'
LISTED = 'rollout.schedule={"class_path":"samplers.Listed","init_args":{"levels":[1.0,0.6,0.2]}}'


def test_a_run_samples_evaluates_and_exports_on_the_grid_of_its_schedule(tiny_pipeline: Path, tmp_path: Path) -> None:
    summary = run_it(tiny_pipeline, tmp_path, "run.iterations=1", SHIFT)
    assert latest(tmp_path / "tiny") is not None
    expected = [float(str(level)) for level in PlainShift(2.0).sigmas(2, lambda steps: torch.ones(1))[:-1].numpy()]
    assert summary["pipeline"]["arguments"]["sigmas"] == expected == [1.0, 0.6666667]
    assert len([line for line in summary["pipeline"]["setup"] if "shift=1.0" in line]) == 1
    snippet = load_snippet(tmp_path / "tiny", json.loads((tmp_path / "tiny" / "summary.json").read_text())["pipeline"])
    assert "sigmas=[1.0, 0.6666667]," in snippet and "shift=1.0" in snippet
    compile(snippet, "snippet", "exec")


def settings(*overrides: str):
    return load_config(CONFIG, overrides)[0]


def test_evaluations_take_the_schedule_of_the_rollout_unless_they_have_one() -> None:
    config = settings(SHIFT)
    assert evaluation_schedule(config) == PlainShift(2.0)
    assert evaluation_schedule(replace(config, rollout=replace(config.rollout, schedule=None))) is None
    assert evaluation_schedule(settings(SHIFT, "evaluation.schedule=samplers.FamilyGrid")) == FamilyGrid()


def test_schedules_that_do_not_fit_are_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.schedule: got num_inference_steps=2 with the 3 levels"):
        settings(LISTED)
    folder = tiny_sd15(tmp_path / "sd15")
    with pytest.raises(ConfigError, match=r"rollout\.schedule: got PlainShift.*takes no other"):
        load_config(CONFIG.replace("tiny.yaml", "tiny_sd15.yaml"), [f"policy.path={folder}", SHIFT])
