"""Child processes: how many at once, what is said of them, and how they are stopped."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from flowalign.compare import launch
from flowalign.compare.launch import Launcher
from flowalign.compare.plan import Planned
from flowalign.compare.spec import Budget


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "POLL", 0.02)


def planned(tmp_path: Path, name: str, seed: int = 1) -> Planned:
    folder = tmp_path / "runs" / f"{name}-s{seed}"
    return Planned(name, seed, Budget("evaluations", 10.0), "hash", folder, tmp_path / f"{name}.json", (), ())


def does(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child does in place of training."""
    monkeypatch.setattr(Planned, "command", property(lambda self: [sys.executable, "-c", script, str(self.folder)]))


def test_children_run_with_one_thread_and_are_finished_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    does("import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS'])", monkeypatch)
    finished: list[str] = []
    launcher = Launcher(1, (1, 3), lambda run: finished.append(f"{run.method}{run.seed}"))
    launcher.run([planned(tmp_path, "a", 1), planned(tmp_path, "a", 2)])
    assert finished == ["a1", "a2"] and launcher.failures == []
    assert (tmp_path / "runs" / "a-s2").read_text() == "1"
    said = capsys.readouterr().out
    assert "run 2 of 3: a seed 1; log" in said  # nothing is finished yet, so no time
    assert "run 3 of 3: a seed 2, about 0 s; log" in said


def test_a_child_that_fails_is_told_by_its_last_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does("import sys\nif 'bad' in sys.argv[1]: print('so it is'); sys.exit(1)", monkeypatch)
    finished: list[str] = []
    launcher = Launcher(2, (0, 2), lambda run: finished.append(run.method))
    launcher.run([planned(tmp_path, "bad"), planned(tmp_path, "good")])
    assert finished == ["good"] and launcher.failures == ["bad-s1 ended with code 1: so it is"]


def test_the_reason_is_found_among_what_others_write_into_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does("import sys; print('3%| 1/9\\rconfiguration error: another process\\n4%| 2/9'); sys.exit(2)", monkeypatch)
    run = planned(tmp_path, "a")
    run.folder.parent.mkdir()
    run.folder.with_name("a-s1.log").write_text("stopped: long ago\n")
    launcher = Launcher(1, (0, 1), lambda run: None)
    launcher.run([run])
    assert launcher.failures == ["a-s1 ended with code 2: configuration error: another process"]


def test_no_child_goes_on_after_an_error_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does(
        "import os, pathlib, sys, time\n"
        "other = pathlib.Path(sys.argv[1].replace('first', 'other') + '.pid')\n"
        "if 'first' not in sys.argv[1]:\n"
        "    other.with_suffix('.new').write_text(str(os.getpid())); other.with_suffix('.new').replace(other); time.sleep(60)\n"
        "while not other.exists(): time.sleep(.01)", monkeypatch,
    )  # fmt: skip

    def full(run: Planned) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        Launcher(2, (0, 2), full).run([planned(tmp_path, "first"), planned(tmp_path, "other")])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "runs" / "other-s1.pid").read_text()), 0)


def test_sigterm_stops_every_child_and_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does(
        "import signal, sys, time, pathlib\n"
        "def stop(*_): time.sleep(.1); pathlib.Path(sys.argv[1] + '.saved').touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[1] + '.ready').touch(); time.sleep(60)", monkeypatch,
    )  # fmt: skip
    runs = [planned(tmp_path, "a"), planned(tmp_path, "b")]

    def when_ready() -> None:
        while not all(run.folder.with_name(f"{run.folder.name}.ready").exists() for run in runs):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=when_ready).start()
    with pytest.raises(KeyboardInterrupt, match="stopped 2 runs; the same command"):
        Launcher(2, (0, 2), lambda run: None).run(runs)
    assert all(run.folder.with_name(f"{run.folder.name}.saved").exists() for run in runs)
