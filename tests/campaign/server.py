"""Forks once per case: reads [words, folder, seconds] as lines of JSON, answers with the exit code, null after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback

import flowalign.cli
import flowalign.diagnostics.benchmark
import flowalign.diagnostics.doctor
import flowalign.loop
import flowalign.models.families.sd3
import flowalign.models.families.sd15


def child(words: list[str], folder: str) -> None:
    """Never returns."""
    os.setsid()
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = ["flowalign", *words]
    sys.path[0] = folder
    code = 1
    try:
        flowalign.cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    for line in sys.stdin:
        words, folder, seconds = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(words, folder)
        print(json.dumps(wait(pid, seconds)), flush=True)
