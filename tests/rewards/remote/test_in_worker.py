"""A reward in a worker: the same bits as in this process, and for each way in which a worker can fail nothing lost, no wrong
number, and a clear message. Only the first tests start a reward; the others a worker that answers without torch."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rewards import InWorker, JPEGIncompressibility, Mix, RewardBatch, RewardError, score
from rewards.remote import in_worker, wire
from tests.helpers.remote_rewards import Spread, mixed_batch, same

# ------------------------------------------------------------------------------------------ a reward, with torch


def parts() -> Mix:
    return Mix([Spread(3.0), JPEGIncompressibility()], [1.0, 0.25])


@pytest.fixture(scope="module")
def placed() -> Iterator[InWorker]:
    reward = InWorker(parts(), environment={"OMP_NUM_THREADS": "1"})
    yield reward
    reward.close()


def test_scores_are_those_of_this_process_bit_for_bit(placed: InWorker) -> None:
    same(score(placed, mixed_batch()), score(parts(), mixed_batch()))
    in_threes = InWorker(parts(), batch_size=3)
    in_threes._pool = placed._pool  # a second worker would take as long as importing torch
    same(score(in_threes, mixed_batch(7, seed=4)), score(parts(), mixed_batch(7, seed=4)))
    assert score(placed, mixed_batch().select([])).scores.shape == (0, 1)


def test_what_the_reward_says_when_it_fails_arrives_and_the_worker_goes_on(placed: InWorker) -> None:
    placed.load()
    before = placed.pids()
    bad = RewardBatch(prompts=["raise"], images=torch.rand(1, 3, 4, 4))
    with pytest.raises(RewardError, match=r"failed on 1 samples: .*in its worker, .*OSError: no weights here"):
        score(placed, bad)
    same(score(placed, mixed_batch()), score(parts(), mixed_batch()))
    assert placed.pids() == before


def test_a_reward_that_prints_on_stdout_does_no_harm(placed: InWorker) -> None:
    chatty = RewardBatch(prompts=["chat", "p"], images=torch.rand(2, 3, 4, 4))
    same(score(placed, chatty), score(parts(), chatty))


def test_it_is_not_differentiable_and_not_loaded_here() -> None:
    reward = InWorker(Spread(3.0))
    assert (reward.name, reward.spec.range, reward.spec.differentiable, reward.pids()) == ("spread", (0, 10), False, [])
    with pytest.raises(RewardError, match="expected a differentiable reward"):
        score(reward, mixed_batch(), grad=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout=0"),
        ({"restarts": -1}, "restarts=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_memory": 0}, "max_memory=0"),
        ({"python": "/no/such/python"}, "'/no/such/python', no program; expected an interpreter"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InWorker(Spread(), **options)


# ------------------------------------------------------------------------------------------ workers that fail

ENGINE = """
import os, signal, sys, time
from pathlib import Path
import numpy as np

FOLDER = Path({folder!r})

class Engine:
    def __init__(self, **options):
        if (FOLDER / "slow").exists():
            time.sleep(float((FOLDER / "slow").read_text()))
        self.kept = []

    def __call__(self, header, array):
        with open(FOLDER / "asked", "a") as file:
            file.write("x")
        for name in ("die", "die once"):
            if (FOLDER / name).exists():
                if name == "die once":
                    (FOLDER / name).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        if (FOLDER / "hang").exists():
            time.sleep(600)
        if (FOLDER / "leak").exists():
            self.kept.append(np.ones(4_000_000))  # 32 MB
        print("chat", flush=True)
        return {{}}, np.fromfile(FOLDER / "answer", dtype=np.uint8)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InWorker]]:
    """Makes an InWorker(Spread(3.0)) whose process has the right answer on mixed_batch() in a file; files of tmp_path say
    how it fails."""
    (tmp_path / "engine.py").write_text(ENGINE.format(folder=str(tmp_path)))
    (tmp_path / "answer").write_bytes(wire.encode_output(score(Spread(3.0), mixed_batch())))
    monkeypatch.setattr(in_worker, "ENGINE", tmp_path / "engine.py")
    made = []

    def make(**options) -> InWorker:
        made.append(InWorker(Spread(3.0), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def asked(folder: Path) -> int:
    return len((folder / "asked").read_text())


def test_a_worker_that_was_killed_is_replaced_and_nothing_is_lost(worker, tmp_path: Path) -> None:
    reward = worker()
    (tmp_path / "die once").touch()  # in the middle of a batch
    same(score(reward, mixed_batch()), score(Spread(3.0), mixed_batch()))
    assert asked(tmp_path) == 2
    (former,) = reward.pids()
    os.kill(former, signal.SIGKILL)  # between two
    same(score(reward, mixed_batch()), score(Spread(3.0), mixed_batch()))
    assert reward.pids() != [former]


def test_a_worker_that_always_dies_is_an_error(worker, tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    with pytest.raises(RewardError, match=r"reward 'spread' failed .*died \(signal 9\).*asked 2 times"):
        score(worker(), mixed_batch())
    assert asked(tmp_path) == 2


def test_a_worker_that_hangs_is_killed_not_asked_again_and_replaced(worker, tmp_path: Path) -> None:
    reward = worker(timeout=0.5)
    reward.load()
    (former,) = reward.pids()
    (tmp_path / "hang").touch()
    with pytest.raises(RewardError, match=r"gave no answer in 0\.5 s"):
        score(reward, mixed_batch())
    assert asked(tmp_path) == 1 and reward.pids() == []
    with pytest.raises(ProcessLookupError):
        os.kill(former, 0)
    (tmp_path / "hang").unlink()
    reward.timeout = 60.0
    same(score(reward, mixed_batch()), score(Spread(3.0), mixed_batch()))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_worker_that_leaks_is_replaced_between_batches(worker, tmp_path: Path) -> None:
    (tmp_path / "leak").touch()
    reward, expected, seen = worker(), score(Spread(3.0), mixed_batch()), []
    reward.load()
    reward.max_memory = 0.001  # any reading is above: replaced every time
    start = reward._memory()
    reward.max_memory = start + 0.05
    for _ in range(4):
        same(score(reward, mixed_batch()), expected)
        seen += reward.pids()
    assert len(seen) == 4 and 1 < len(set(seen)) < 4


def test_a_slow_start_has_its_own_limit(worker, tmp_path: Path) -> None:
    reward = worker(timeout=0.3, start_timeout=60.0)
    (tmp_path / "slow").write_text("0.6")
    reward.load()
    reward.close()
    (tmp_path / "slow").write_text("60")
    hurried = worker(start_timeout=0.5)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'spread' did not start with .*in 0\.5 s"):
        score(hurried, mixed_batch())
    assert time.monotonic() - began < 20 and hurried.pids() == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            'exec {python} -S -E "$@"',
            r"died \(exit code 1\).*It needs Python 3.11, torch, numpy",
        ),  # without site-packages
        ("exit 7", r"died \(exit code 7\).*It needs Python 3.11"),
        ('exec {python} "$@"', "no module of this name|No module named 'torch'"),
    ],
    ids=["no numpy", "no Python", "no torch"],
)
def test_a_wrong_environment_says_what_it_lacks(script: str, said: str, tmp_path: Path) -> None:
    program = tmp_path / "python"
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    program.write_text(f"#!/bin/sh\n{script.format(python=sys.executable)}\n")
    program.chmod(0o755)
    reward = InWorker(Spread(), python=str(program), environment={"PYTHONPATH": str(tmp_path)})
    with pytest.raises(RewardError, match=f"(?s)the worker of reward 'spread' did not start with {program}: .*{said}"):
        reward.load()
    assert reward.pids() == []
