"""What a trainer does before its first iteration (here a calibration) is forecast, counted once, and not done again."""

import json
from pathlib import Path

import pytest

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.run.preflight import forecast
from flowalign.run.run import Run
from tests.helpers.tiny_run import CONFIG, result, run_it

RULE = {"class_path": "flowalign.trainers.GainBalance", "init_args": {"trajectories": 4, "sweeps": 2, "step": 0.1}}
DENSE = [
    "rollout.plan={class_path: samplers.Probed, init_args: {plan: samplers.Chain}}",
    "trainer.signal.credit=flowalign.credit.Gain", "trainer.signal.advantage.within=prompt_step",
    f"trainer.calibration={json.dumps(RULE)}",
]  # fmt: skip
ROWS = 2 * 4 * (3 + 2 + 1)  # sweeps, trajectories, states of a probed chain of three steps


def test_it_is_forecast(tmp_path: Path) -> None:
    def said(*overrides: str) -> str:
        return forecast(load_config(CONFIG, [f"run.output={tmp_path}", *DENSE, *overrides])[0])

    assert f"before the first iteration: at most {ROWS} forwards, 24 images scored" in said()
    plain = said("trainer.calibration=null")
    assert "before the first iteration" not in plain
    total = 3 * (2 * 3 * 6 + 2 * 3 * 2)  # iterations; rollout, reference
    assert f"whole run: at most {ROWS + total} forwards" in said() and f"at most {total} forwards" in plain


def test_a_run_killed_in_its_second_iteration_goes_on_as_if_it_had_not_been(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_it(tiny_pipeline, tmp_path / "whole", *DENSE)
    step, calls = Run.step, []

    def dies(self: Run, update) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("killed")
        step(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyError):
            run_it(tiny_pipeline, tmp_path / "killed", *DENSE)
    resumed = run_it(tiny_pipeline, tmp_path / "killed", *DENSE)
    (tensors, state, rows), (other_tensors, other_state, other_rows) = (
        result(tmp_path / name) for name in ("whole", "killed")
    )
    assert state == other_state and rows == other_rows and len(state["trainer"]["factors"]) == 3
    assert all(bool((tensors[name] == other_tensors[name]).all()) for name in tensors)
    for name, spent in (("evaluations", ROWS), ("decodes", 24), ("reward_calls", 24)):
        assert [row.get(f"cost/prepare_{name}") for row in rows] == [spent, None, None]
    assert [row["cost/rollout_per_image"] for row in rows] == [6, 6, 6]
    rolled = summary["evaluations_per_image"]["rollout"]
    assert rolled == resumed["evaluations_per_image"]["rollout"] == pytest.approx((3 * 36 + ROWS) / 18)


def test_what_it_cannot_calibrate_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    cps = ["rollout.kernel=samplers.CPS", "trainer.regularizers.kl.form=exact"]
    with pytest.raises(ConfigError, match=r"highest=2\.0 with rollout\.kernel=CPS.*Lower highest"):
        load_config(CONFIG, [*DENSE, *cps])
    load_config(CONFIG, [*DENSE, *cps, "trainer.calibration.highest=1.4"])
    two = "reward={class_path: rewards.Channels, init_args: {rewards: [rewards.JPEGCompressibility, rewards.JPEGIncompressibility]}}"
    mixed = "trainer.signal.advantage={class_path: flowalign.advantage.Mixed, init_args: {advantage: flowalign.advantage.Normalized}}"
    with pytest.raises(ConfigError, match="sum them in one reward"):
        load_config(CONFIG, [*DENSE[:2], *DENSE[3:], two, mixed])
