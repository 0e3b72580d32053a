"""A reward cannot change the process that asks it: what it changes is put back, or it is refused."""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rewards import Mix, RewardBatch, RewardError, RewardOutput, WithTimeout, close, score
from tests.helpers.plain_rewards import Plain, batch_of, brightness


def doing(what: Callable[[RewardBatch], Any]) -> Plain:
    """A reward that does something beside its work."""

    def answer(batch: RewardBatch) -> RewardOutput:
        output = brightness(batch)
        what(batch)
        return output

    return Plain(answer)


# name: (how it is read, what a reward does to it)
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "working directory": (os.getcwd, lambda: os.chdir("/")),
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(not torch.is_grad_enabled())),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "matmul precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("medium")),
    "determinism": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "Ctrl-C": (lambda: signal.getsignal(signal.SIGINT), lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)),
    "SIGTERM": (lambda: signal.getsignal(signal.SIGTERM), lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)),
    "seed of torch": (lambda: torch.get_rng_state().tolist(), lambda: torch.manual_seed(7)),
    "draw of torch": (lambda: torch.get_rng_state().tolist(), lambda: torch.rand(3)),
    "seed of numpy": (lambda: str(np.random.get_state()), lambda: np.random.seed(7)),
    "draw of Python": (random.getstate, random.random),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fails", [False, True], ids=["scores", "fails"])
def test_what_a_reward_changes_is_put_back(name: str, fails: bool) -> None:
    read, change = CHANGES[name]
    before = read()

    def what(batch: RewardBatch) -> None:
        change()
        if fails:
            raise OSError("after the change")

    reward = doing(what)
    if fails:
        with pytest.raises(RewardError, match="after the change"):
            score(reward, batch_of(2))
    else:
        assert score(Mix([reward], [1.0]), batch_of(2)).valid.all()  # a call inside a call
    assert read() == before


def test_close_is_isolated_too() -> None:
    class Closing(Plain):
        def close(self) -> None:
            os.chdir("/")
            raise SystemExit(3)

    before = os.getcwd()
    with pytest.raises(RewardError, match="reward 'plain' failed to close: SystemExit: 3"):
        close(Closing(brightness))
    assert os.getcwd() == before


@pytest.mark.parametrize(
    ("argument", "said"), [((), "SystemExit"), ((3,), "SystemExit: 3"), (("no model",), "no model")]
)
def test_sys_exit_is_a_failure_of_the_reward(argument: tuple, said: str) -> None:
    for reward in (doing(lambda batch: sys.exit(*argument)), WithTimeout(doing(lambda batch: sys.exit(*argument)), 60)):
        with pytest.raises(RewardError, match=f"reward 'plain' failed on 2 samples: .*{said}$"):
            score(reward, batch_of(2))


def test_ctrl_c_is_none() -> None:
    def what(batch: RewardBatch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(doing(what), batch_of(2))


@pytest.mark.parametrize(
    "child", [lambda: None, lambda: sys.exit(0), lambda: 1 / 0], ids=["returns", "exits", "raises"]
)
def test_a_forked_copy_does_not_come_back(child: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []

    def what(batch: RewardBatch) -> None:
        copy = os.fork()
        if copy == 0:
            child()
        else:
            ended.append(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))

    parent = os.getpid()
    score(doing(what), batch_of(2))
    assert os.getpid() == parent and ended == [1]
    assert "reward 'plain' forked, and its copy came back" in capfd.readouterr().err


def test_draws_of_rewards_go_on_from_call_to_call() -> None:
    """A random reward is not the same random number for ever, and a seed holds for the calls after it."""
    drawn: list[float] = []
    reward = doing(lambda batch: drawn.append(float(torch.rand(()))))
    score(doing(lambda batch: torch.manual_seed(5)), batch_of(1))
    for _ in range(3):
        score(reward, batch_of(1))
        torch.rand(9)  # the caller's own draws do not matter to it
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert drawn == expected


def test_a_late_thread_puts_nothing_back() -> None:
    """A call that outlives its timeout ends while the run goes on: it must not undo what the run did meanwhile."""
    release, left = threading.Event(), threading.Event()

    def what(batch: RewardBatch) -> None:
        release.wait(20)
        left.set()

    with pytest.raises(RewardError, match=r"no answer on 2 samples within 0\.05 s"):
        score(WithTimeout(doing(what), timeout=0.05), batch_of(2))
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    release.set()
    left.wait(20)
    for thread in threading.enumerate():
        if thread.name.startswith("reward "):
            thread.join(20)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_write_into_the_batch_is_refused() -> None:
    with pytest.raises(
        RewardError, match=r"reward 'plain' wrote into the images of its batch; expected them unchanged.*clone"
    ):
        score(doing(lambda batch: batch.images.clamp_(0.2, 0.3)), batch_of(2))


def test_prompts_and_metadata_are_copies() -> None:
    batch = batch_of(2)
    batch.metadata[0]["target"] = "A"
    score(doing(lambda given: (given.metadata[0].pop("target"), given.prompts.clear())), batch)
    assert batch.metadata[0] == {"target": "A"} and batch.prompts == ["p0", "p1"]
