"""The folder of a run: held by one process at a time, made by one configuration, and never half taken up."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from flowalign.errors import ConfigError
from flowalign.storage import checkpoint
from flowalign.storage.files import write_atomic
from flowalign.storage.metrics_log import MetricsLog

MAY_CHANGE = {
    "run.iterations", "run.checkpoint_every", "run.keep_checkpoints", "run.trackers", "run.resume", "run.output",
}  # fmt: skip


def open_folder(folder: Path, plain: dict[str, Any]) -> IO[str]:
    """Makes or takes up the folder for the configuration `plain`; closing what is returned lets another process in.

    Raises ConfigError, the folder as it was, if another process trains in it, if it was made otherwise, if its
    checkpoints are gone or reach further than the configuration, or if it cannot be made."""
    try:
        if folder.is_dir() and not (folder / "config.yaml").exists() and any(_visible(folder)):
            raise ConfigError(f"{folder} exists, but is not a run (no config.yaml): choose another run.name")
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            if (folder / "config.yaml").exists():
                _check_saved(folder, plain)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error}): choose another run.output, or mend that") from error
    return lock


def describe(folder: Path, plain: dict[str, Any]) -> None:
    """Writes what the run is made of, once nothing more can refuse it: a failed start leaves the name free."""
    write_atomic(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
    write_atomic(folder / "provenance.json", json.dumps(_provenance(folder), indent=1).encode())


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _lock(folder: Path) -> IO[str]:
    """The system drops the lock when the process ends, however that happens."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(
            f"another process is training in {folder}: wait for it, stop it, or choose another run.name"
        ) from error
    return lock


def _check_saved(folder: Path, plain: dict[str, Any]) -> None:
    if plain["run"]["resume"] == "never":
        raise ConfigError(f"{folder} exists and run.resume=never: choose another run.name, or remove it")
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        every = saved["run"]["checkpoint_every"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'config.yaml'} is damaged ({error!r}): restore it, or remove {folder}") from error
    changed = [key for key in differences(saved, plain) if key not in MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"{folder} was made with another configuration; different: {', '.join(changed)}. Choose another "
            "run.name, or go back to the saved config.yaml to resume"
        )
    path = checkpoint.latest(folder)
    rows = MetricsLog(folder / "metrics.jsonl").rows()
    evaluations = MetricsLog(folder / "evaluations.jsonl").rows()
    # the row of an iteration is written before its checkpoint: a kill between the two has lost nothing that was kept
    if path is None and rows and (rows[-1]["step"] > every or (folder / "summary.json").exists()):
        raise ConfigError(
            f"{folder} was trained to iteration {rows[-1]['step']}, but {folder / 'checkpoints'} holds no checkpoint: "
            "restore them, or choose another run.name to start anew"
        )
    if path is None:
        return
    done = checkpoint.step_of(path)
    if done > plain["run"]["iterations"]:
        raise ConfigError(
            f"run.iterations={plain['run']['iterations']}, but {folder} is already at iteration {done}: expected at "
            "least that, or another run.name"
        )
    whole = {"metrics": [row["step"] for row in rows[:done]] == list(range(1, done + 1)),
             "evaluations": [row["step"] for row in evaluations[:1]] == [0]}  # fmt: skip
    for name, complete in whole.items():
        if not complete:
            raise ConfigError(
                f"{folder / name}.jsonl lacks rows, though the run is at iteration {done}: restore it, or choose "
                "another run.name"
            )


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys under which two nested dicts differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    return [
        name
        for key in sorted(old.keys() | new.keys())
        for name in differences(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))
    ]


def _provenance(folder: Path) -> dict[str, Any]:
    """What the run is made with. A later start on other software or threads is noted beside it, and said aloud."""
    packages = ("flowalign-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft", "rapidocr")
    now: dict[str, Any] = {
        "git": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in packages},
    }
    saved = folder / "provenance.json"
    if not saved.exists():
        return now
    try:
        first = json.loads(saved.read_text())
    except ValueError as error:
        raise ConfigError(f"{saved} is damaged ({error}): restore it, or remove it") from error
    later = first.pop("later", [])
    changed = differences(first, now)
    if changed:
        print(f"note: {folder} was begun with other {', '.join(changed)}: it may not go on bit for bit", flush=True)
        later = [*later, now] if now not in later else later
    return {**first, "later": later} if later else first


def _commit() -> str | None:
    """Of the source folder; None without git, or outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    except OSError:
        return None
    return said.strip() or None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed (run from its source folder)"
