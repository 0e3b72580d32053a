"""A bad input, and what came of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
Outcome = Literal["clear", "fine", "unclear", "silent", "traceback", "hang"]


@dataclass(frozen=True)
class Case:
    """A command in a folder of its own, which holds tiny.yaml and `files`.

    damage: changes the folder before the command, and may add what is in `given`: a pipeline and a finished run. fine: it
    is not bad, and has to work. says: what the message has to match. seconds: how long it may take."""

    name: str
    overrides: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("train", "tiny.yaml")
    damage: Callable[[Path], None] | None = None
    fine: bool = False
    says: str = ""
    seconds: float = 60.0


class Server:
    """Runs cases in forks of a process that has imported everything; `given` holds the folders that cases are copies of."""

    def __init__(self, given: Path) -> None:
        self.given = given
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()  # closes its input, which ends it, and the pipes

    def run(self, case: Case, folder: Path) -> tuple[Outcome, str]:
        """What came of it, and its output."""
        assert self._process.stdin is not None and self._process.stdout is not None
        shutil.copytree(self.given, folder, symlinks=True)
        for name, content in case.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if case.damage is not None:
            case.damage(folder)
        words = [*case.arguments, *case.overrides]
        self._process.stdin.write(json.dumps([words, str(folder), case.seconds]) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        text = (folder / "output.txt").read_text(errors="replace")
        return judge(case, code, text), text


def judge(case: Case, code: int | None, text: str) -> Outcome:
    """code: the exit code, None if it had to be killed."""
    if code is None:
        return "hang"
    if "Traceback (most recent call last)" in text or code < 0:
        return "traceback"
    if code == 0:
        return "fine" if case.fine else "silent"
    last = text.strip().rpartition("\n")[2]
    is_sentence = len(last.split()) >= 4 or bool(re.search(r"(configuration error|stopped|usage):", text))
    return "clear" if is_sentence and re.search(case.says, text, re.S) else "unclear"


def expected(case: Case) -> Outcome:
    return "fine" if case.fine else "clear"
