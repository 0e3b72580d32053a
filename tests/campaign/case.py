"""A bad input, and what came of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.helpers.forks import Forks

FLOWALIGN = "import sys; sys.argv[0] = 'flowalign'; import flowalign.cli; flowalign.cli.main()"
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


@dataclass(frozen=True)
class Server:
    """Runs cases in forks; `given` holds the folders that cases are copies of."""

    given: Path
    forks: Forks

    def run(self, case: Case, folder: Path) -> tuple[Outcome, str]:
        """What came of it, and its output."""
        shutil.copytree(self.given, folder, symlinks=True)
        for name, content in case.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if case.damage is not None:
            case.damage(folder)
        words = ["-c", FLOWALIGN, *case.arguments, *case.overrides]
        code, text = self.forks.run(*words, folder=folder, seconds=case.seconds)
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
