"""metrics.jsonl: whole rows, exact numbers, cut back to a checkpoint."""

import json
import os
import time

import numpy as np
import pytest
import torch

from flowalign.storage.metrics_log import MetricsLog, without_time


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    for step in range(5):
        log.append(step, {"reward/mean": step / 3, "time/rollout": 0.5})
    return log


def test_rows_hold_the_step_exact_numbers_and_the_clock_under_time(log):
    before = time.time()
    log.append(5, {"reward/mean": 0.1 + 0.2, "optim/lr": np.float32(0.1), "cost/edges": 7, "loss/kl": float("inf")})
    row = log.rows()[-1]
    assert row["reward/mean"] == 0.1 + 0.2 and row["optim/lr"] == float(np.float32(0.1))
    assert row["loss/kl"] is None and row["cost/edges"] == 7 and isinstance(row["cost/edges"], int)
    assert row["time/wall"] == pytest.approx(before, abs=60)
    assert without_time(row).keys() == {"step", "reward/mean", "optim/lr", "cost/edges", "loss/kl"}
    assert without_time(log.rows()[1]) == {"step": 1, "reward/mean": 1 / 3}


def test_the_file_is_strict_json(log):
    """json.loads would take NaN and Infinity; other readers do not."""
    log.append(5, {"reward/mean": float("nan"), "loss/kl": float("-inf")})
    constants = []
    rows = [json.loads(line, parse_constant=constants.append) for line in log.path.read_text().splitlines()]
    assert constants == []
    assert len(rows) == 6 and rows[-1]["reward/mean"] is None and rows[-1]["loss/kl"] is None


def test_cutting_back_drops_later_rows_and_a_torn_line_and_leaves_the_others_byte_for_byte(log):
    lines = log.path.read_bytes().splitlines(keepends=True)
    with log.path.open("ab") as file:
        file.write(b'{"step": 2, "reward/me')  # a crash while writing
    with pytest.raises(ValueError, match="torn line"):
        log.append(9, {})
    assert len(log.rows()) == 5  # readers leave the torn line out
    log.cut_back(2)
    assert log.path.read_bytes() == b"".join(lines[:3])
    log.append(3, {"reward/mean": 1.0})
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3]
    assert os.listdir(log.path.parent) == ["metrics.jsonl"]


def test_cutting_back_is_atomic(log, monkeypatch):
    before = log.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("flowalign.storage.files.fsync", lambda path: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            log.cut_back(1)
    assert log.path.read_bytes() == before
    log.cut_back(-1)
    assert log.rows() == []


def test_cutting_back_without_a_file_does_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut_back(3)
    assert log.rows() == [] and not log.path.exists()


@pytest.mark.parametrize("line", [b"{broken\n", b'{"no": "step"}\n', b"[1]\n"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(log, line):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        log.cut_back(4)


@pytest.mark.parametrize("name", ["reward", "reward/", "/mean"])
def test_names_are_group_slash_name(log, name):
    with pytest.raises(ValueError, match="group/name"):
        log.append(1, {name: 1.0})


def test_values_are_numbers(log):
    with pytest.raises(TypeError, match=r"'loss/policy'.*Tensor.*\.item"):
        log.append(1, {"loss/policy": torch.ones(())})
    assert len(log.rows()) == 5
