"""A finding, and how a check becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found. ok None: skipped, since a check it depends on failed. `figure`: what was measured. `advice`: one
    sentence that says what to do, empty when all is well; where ok is True, a warning."""

    name: str
    ok: bool | None
    figure: str
    advice: str = ""

    def __str__(self) -> str:
        mark = "warn" if self.ok and self.advice else {True: "ok  ", False: "FAIL", None: "skip"}[self.ok]
        return f"{mark}  {self.name:<20} {self.figure}" + (f"\n      → {self.advice}" if self.advice else "")


def guarded(name: str, check: Callable[[], Finding], failed: set[str], needs: tuple[str, ...] = ()) -> Finding:
    """The finding of `check`: skipped if one of `needs` failed or was skipped, a failure if it raises. Failed and
    skipped checks are added to `failed`."""
    missing = [need for need in needs if need in failed]
    if missing:
        finding = Finding(name, None, f"needs {', '.join(missing)}")
    else:
        try:
            finding = check()
        except Exception as error:  # whatever a model, a reward or a trainer raises is a finding
            text = " ".join(str(error).split())
            finding = Finding(name, False, type(error).__name__, text or "the check raised without a message")
    if finding.ok is not True:
        failed.add(name)
    return finding
