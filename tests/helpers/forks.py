"""Runs Python programs in forks of one process that has imported flowalign: an interpreter of its own costs seconds of imports.

What a fork cannot show: imports in another order, and processes whose sets are ordered differently. tests/test_extend.py
launches interpreters as users do. `python -m tests.helpers.forks` reads jobs as lines of JSON and answers with exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Forks:
    """The process that forks; it starts with the first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, which ends it, and the pipes

    def run(
        self,
        *words: str,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        count: int = 1,
        seconds: float = 300.0,
    ) -> tuple[int | None, str]:
        """`python *words` in `folder`, where words are -c CODE, -m MODULE or FILE, and arguments: exit code and output.

        `count`: of processes, which meet as those of torchrun do. The code is 0 if it is that of all, else the first other one;
        None if they had to be killed after `seconds`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.forks"], cwd=ROOT, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.NamedTemporaryFile() as output:
            job = [words, str(folder), dict(environment or {}), count, seconds, output.name]
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._process.stdout.readline())
            return code, Path(output.name).read_text(errors="replace")

    def check(self, *words: str, **options: Any) -> str:
        """As `run`, of a program that has to succeed: its output."""
        code, text = self.run(*words, **options)
        assert code == 0, text[-3000:]
        return text


# ------------------------------------------------------------------------------------------ in the process that forks


def execute(words: Sequence[str]) -> None:
    """As the interpreter would."""
    first, *others = words
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], os.getcwd()
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = others, os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def child(words: Sequence[str], folder: str, environment: Mapping[str, str], output: str) -> None:
    """Never returns."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    streams = os.open(output, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for number, opened in ((1, streams[0]), (2, streams[0]), (0, streams[1])):
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = 1
    try:
        execute(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)  # torch's threads sometimes abort the interpreter's own exit, after all is done


def meeting(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    if count == 1:
        return {}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(children: set[int], seconds: float) -> int | None:
    """Until all have ended, or one has failed: it would leave the others waiting."""
    end, code = time.monotonic() + seconds, 0
    while children and code == 0 and time.monotonic() < end:
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None if children and code == 0 else code


def serve() -> None:
    for line in sys.stdin:
        words, folder, environment, count, seconds, output = json.loads(line)
        children, port = set(), free_port()
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                child(words, folder, {**environment, **meeting(rank, count, port)}, output)
            children.add(pid)
        print(json.dumps(wait(children, seconds)), flush=True)


if __name__ == "__main__":
    for name in (
        "diffusers.loaders", "torch.distributed.fsdp", "torch.distributed.tensor", "flowalign.cli", "flowalign.loop",
        "flowalign.diagnostics.benchmark", "flowalign.diagnostics.doctor", "flowalign.report.html",
        "flowalign.models.families.sd3", "flowalign.models.families.sd15",
    ):  # fmt: skip
        import_module(name)
    serve()
    os._exit(0)
