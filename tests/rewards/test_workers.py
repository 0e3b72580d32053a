"""The pool of helper processes: order, and every way in which a worker can fail; nobody is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.workers.pool import WorkerDied, WorkerError, Workers

ENGINE = """
import os, signal, sys, time

class Engine:
    def __init__(self, plus=0, start="well"):
        if start == "hang":
            time.sleep(60)
        if start == "raise":
            raise ValueError("no weights here")
        self.plus = plus

    def __call__(self, header, array):
        if "touch" in header:
            open(header["touch"], "w").close()
        time.sleep(header.get("sleep", 0))
        if header.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if header.get("raise"):
            raise KeyError("broken picture")
        print("an engine that chats on stdout does no harm")
        return {"pid": os.getpid(), "torch": "torch" in sys.modules}, array + self.plus
"""


@pytest.fixture
def pool(tmp_path):
    made = []

    def make(count=1, timeout=60.0, **options):
        file = tmp_path / "engine.py"
        file.write_text(ENGINE)
        made.append(Workers(file, options, count, timeout))
        return made[-1]

    yield make
    for each in made:
        each.close()


def job(number=0.0, **header):
    return header, np.full((2, 3), number, dtype=np.float32)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if sys.platform == "linux" else True


def gone(pids, within):
    end = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_answers_come_in_the_order_of_the_jobs(pool):
    workers = pool(2, plus=1)
    delays = [0.15, 0, 0.05, 0, 0.02, 0]
    answers = workers.map([job(i, sleep=delay) for i, delay in enumerate(delays)])
    assert [array[0, 0] for _, array in answers] == [1, 2, 3, 4, 5, 6]
    assert answers[0][1].shape == (2, 3) and answers[0][1].dtype == np.float32
    assert {header["pid"] for header, _ in answers} == set(workers.pids()) and len(workers.pids()) == 2
    assert not any(header["torch"] for header, _ in answers)


def test_nothing_starts_before_the_first_map_and_close_ends_all(pool):
    workers = pool(1)
    assert workers.pids() == []
    assert workers.map([]) == []
    pids = workers.pids()
    assert len(pids) == 1 and alive(pids[0])
    workers.close()
    assert workers.pids() == [] and not alive(pids[0])
    assert workers.map([job(3)])[0][1][0, 0] == 3  # and it can begin again


def test_close_does_not_wait_for_an_answer_that_another_thread_awaits(pool, tmp_path):
    """A run that is interrupted closes its rewards while the thread that scores is still asking."""
    workers, started = pool(1), tmp_path / "started"
    workers.map([])
    pids, errors = workers.pids(), []

    def ask():
        try:
            workers.map([job(touch=str(started), sleep=600)])
        except WorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not started.exists():
        thread.join(0.02)
    closing = threading.Thread(target=workers.close, daemon=True)
    closing.start()
    closing.join(20)
    thread.join(20)
    assert not closing.is_alive() and not thread.is_alive() and not any(alive(pid) for pid in pids)
    assert [str(error) for error in errors] == ["the pool was closed before an answer"]
    assert not isinstance(errors[0], WorkerDied)  # for which a new worker would be started
    assert workers.map([job(3)])[0][1][0, 0] == 3


def test_hanging_worker_is_a_timeout_and_the_pool_recovers(pool):
    workers = pool(2)
    workers.map([])  # starting takes what it takes
    workers.timeout = 2
    pids = workers.pids()
    with pytest.raises(TimeoutError, match=r"1 of 2 workers gave no answer in 2 s"):
        workers.map([job(0), job(1, sleep=600)])
    workers.timeout = 60
    assert not any(alive(pid) for pid in pids)
    assert [array[0, 0] for _, array in workers.map([job(7), job(8)])] == [7, 8]
    assert not set(workers.pids()) & set(pids)


def test_stopped_worker_cannot_block_a_large_job(pool):
    workers = pool(1)
    workers.map([])
    workers.timeout = 0.3
    os.kill(workers.pids()[0], signal.SIGSTOP)
    with pytest.raises(TimeoutError, match="stopped"):
        workers.map([({}, np.zeros((64, 512, 512, 3), dtype=np.uint8))])
    assert workers.pids() == []


def test_a_signal_to_the_whole_group_is_the_parents_business(pool):
    workers = pool()
    workers.map([])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(workers.pids()[0], number)
    assert workers.map([job(3)])[0][1][0, 0] == 3


def test_dying_worker_is_an_error(pool):
    workers = pool(2)
    with pytest.raises(WorkerError, match="died \\(signal 9\\)"):
        workers.map([job(0), job(1, die=True), job(2)])
    assert len(workers.map([job()] * 3)) == 3


def test_error_in_the_engine_carries_its_traceback(pool):
    workers = pool(1)
    with pytest.raises(WorkerError, match=r"(?s)Traceback.*KeyError: 'broken picture'"):
        workers.map([job(**{"raise": True})])
    assert len(workers.map([job()])) == 1


def test_start_that_fails_or_hangs(pool):
    with pytest.raises(WorkerError, match="no weights here"):
        pool(1, start="raise").map([job()])
    workers = pool(1, timeout=0.5, start="hang")
    with pytest.raises(TimeoutError, match="did not start"):
        workers.map([job()])
    assert workers.pids() == []


def test_workers_go_with_the_last_reference(tmp_path):
    file = tmp_path / "engine.py"
    file.write_text(ENGINE)
    workers = Workers(file, {}, 1, 60.0)
    workers.map([])
    pids = workers.pids()
    del workers
    assert not any(alive(pid) for pid in pids)


def test_busy_torch_threads_and_a_second_caller_do_not_deadlock(pool):
    import threading

    workers = pool(2)
    stop = threading.Event()

    def multiply():
        while not stop.is_set():
            torch.rand(64, 64) @ torch.rand(64, 64)

    results = []
    threads = [threading.Thread(target=multiply)] + [
        threading.Thread(target=lambda n=n: results.append(workers.map([job(n)] * 4))) for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(60)
    stop.set()
    threads[0].join(60)
    assert sorted(answer[0][1][0, 0] for answer in results) == [1, 2]


def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_job(tmp_path):
    """Also: the caller's main is standard input, which multiprocessing's spawn could not import again."""
    (tmp_path / "engine.py").write_text(ENGINE)
    main = f"""
import os, signal, threading, time
from pathlib import Path
import numpy as np
from rewards.workers.pool import Workers
workers = Workers(Path({str(tmp_path / "engine.py")!r}), {{}}, 2, 60)
workers.map([])
print(*workers.pids(), flush=True)
threading.Thread(target=lambda: workers.map([({{"sleep": 60}}, np.zeros(1))]), daemon=True).start()
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run(
        [sys.executable, "-"], input=main, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 2 and gone(pids, within=30)


def test_forked_copy_leaves_the_workers_alone(tmp_path):
    """The copy runs the exit handlers of its parent; in a process of its own, since forking beside threads warns."""
    (tmp_path / "engine.py").write_text(ENGINE)
    main = f"""
import os, sys
from pathlib import Path
import numpy as np
from rewards.workers.pool import Workers

workers = Workers(Path({str(tmp_path / "engine.py")!r}), {{}}, 1, 60.0)
workers.map([])
before = workers.pids()
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
(header, array), = workers.map([({{}}, np.ones(1))])
print(before == [header["pid"]] == workers.pids())
"""
    result = subprocess.run(
        [sys.executable, "-"], input=main, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60
    )
    assert result.stdout.splitlines()[-1:] == ["True"], result.stderr
