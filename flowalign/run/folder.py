"""The run folder: locked by one process, tied to one configuration, validated before resuming."""

from __future__ import annotations

import fcntl
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from flowalign.errors import ConfigError
from flowalign.run.trial_result import TIMES
from flowalign.storage import checkpoint
from flowalign.storage.files import read_json, write_atomic
from flowalign.storage.metrics_log import MetricsLog

# What a resumed run may change without a word: how long it is, what it keeps and what it shows.
MAY_CHANGE = re.compile(
    r"run\.(iterations|max_evaluations|max_seconds|checkpoint_every|keep_checkpoints|resume|output|gradient_check|project|device_\w+)"
    r"|run\.(trackers|tags)(\..*)?|evaluation\.every"
)
# What it may change as well, noted: speed and memory; results differ by rounding.
MAY_CHANGE_NOTED = re.compile(
    r"(rollout|trainer\.init_args)\.micro_batch|rollout\.(fixed_rows|chunk|overlap)|evaluation\.batch_size"
    r"|policy\.(decode_batch|offload(\..*)?|gradient_checkpointing|compile|attention)"
    r"|(reward|evaluation\.rewards|process_rewards|rollout\.(reward_guidance\.reward|preview_reward))\..*(workers|timeout)"
)
# What it may never change beside those: the saved weights, optimizer state and base evaluation belong to it.
MAY_NOT_CHANGE = re.compile(r"(policy|evaluation|reward)(\..*)?|trainer\.class_path")
PLACED = ("InWorker", "Http", "Offloaded")  # what `place` puts around a reward


Changes = dict[str, tuple[Any, Any]]  # dotted key -> former and new value


def run_folder(place: str | Path) -> Path:
    """The absolute path of a run folder. ConfigError for what is none."""
    folder = Path(place).expanduser().absolute()
    if not (folder / "config.yaml").is_file():
        near = folder.parent / "runs" / folder.name
        hint = f"did you mean {near}?" if (near / "config.yaml").is_file() else "name one, such as runs/quickstart"
        raise ConfigError(
            f"got {place}, which is no run folder (no {folder / 'config.yaml'}); expected one that a run wrote: {hint}"
        )
    return folder


def open_folder(folder: Path, plain: dict[str, Any]) -> IO[str]:
    """Makes the folder for the configuration `plain`, or opens it again. Returns the open lock file; close it to
    release the folder.

    Raises ConfigError, and leaves an existing run unchanged, if another process trains in it, if it was made with a configuration that
    cannot be resumed with this one, if its checkpoints are lost or reach further than the configuration, or if it cannot
    be made."""
    try:
        if folder.is_dir() and not (folder / "config.yaml").exists() and any(_visible(folder)):
            raise ConfigError(f"{folder} exists, but is not a run (no config.yaml): choose another run.name")
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(
            folder,
            f"another process is training in {folder}: wait for it, stop it, or choose another run.name",
        )
        try:
            if (folder / "config.yaml").exists():
                _check_saved(folder, plain)
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {folder} ({error}): make it writable, or choose another run.output") from error
    return lock


def describe(
    folder: Path, plain: dict[str, Any], contents: Changes | None = None, rewards: dict[str, Any] | None = None
) -> None:
    """Writes config.yaml and provenance.json. Called after all checks and the model load: a start that fails before this
    leaves run.name unused. rewards: what their trials found, see trial_result.records; None leaves that out.
    Settings that changed are noted in provenance.json and printed, and so are `contents`, what changed behind them."""
    config, provenance = folder / "config.yaml", folder / "provenance.json"
    changes = _changes(yaml.safe_load(config.read_text(encoding="utf-8")), plain) if config.exists() else {}
    changes |= contents or {}
    text = json.dumps(_provenance(folder, changes, rewards), indent=1).encode()
    if changes:  # before the configuration that no longer shows them, in case of a kill between the two
        write_atomic(provenance, text)
    write_atomic(config, yaml.safe_dump(plain, sort_keys=False).encode())
    write_atomic(provenance, text)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def lock_folder(folder: Path, taken: str) -> IO[str]:
    """The open lock file of a folder; the system drops the lock when the process ends, however that happens. ConfigError that
    says `taken` if another process holds it."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ConfigError(taken) from error
    return lock


def _check_saved(folder: Path, plain: dict[str, Any]) -> None:
    if plain["run"]["resume"] == "never":
        raise ConfigError(f"{folder} exists and run.resume=never: choose another run.name, or remove it")
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        every = saved["run"]["checkpoint_every"]
        changes = _changes(_bare(saved), _bare(plain))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{folder / 'config.yaml'} is damaged ({why}): restore it, or remove {folder}") from error
    _check_changes(folder, changes, plain["run"]["resume"])
    _check_logs(folder, plain["run"]["iterations"], every)


def _changes(saved: dict[str, Any], plain: dict[str, Any]) -> Changes:
    return {key: values for key, values in differences(saved, plain).items() if not MAY_CHANGE.fullmatch(key)}


def _bare(value: Any) -> Any:
    """A configuration in which every reward is in the run's process: where it lives does not change its scores, so a resumed run
    may change that; `describe` notes it. A fingerprint that was written down stays, it accepts a reward that differs."""
    if isinstance(value, list):
        return [_bare(each) for each in value]
    if not isinstance(value, dict):
        return value
    package, _, name = str(value.get("class_path")).rpartition(".")
    if package.partition(".")[0] != "rewards" or name not in PLACED:
        return {key: _bare(each) for key, each in value.items()}
    accepted = value["init_args"].get("fingerprint")
    return _bare(value["init_args"]["reward"]) | ({} if accepted is None else {"fingerprint": accepted})


def _check_changes(folder: Path, changes: Changes, resume: str) -> None:
    """ConfigError for changed settings, unless they only change speed or run.resume=changed allows them."""
    others = [key for key in changes if not MAY_CHANGE_NOTED.fullmatch(key)]
    fixed = [key for key in others if MAY_NOT_CHANGE.fullmatch(key)]
    if None in changes.get("run.ema_decay", ()):
        fixed.append("run.ema_decay")  # the checkpoint has an average, or has none
    if fixed:
        raise ConfigError(
            f"got another {', '.join(fixed)} than {folder} was begun with; expected the same, since the saved weights, "
            "optimizer state and base evaluation belong to it: go back to the saved config.yaml, or choose another run.name"
        )
    if others and resume != "changed":
        raise ConfigError(
            f"{folder} was made with another configuration; different: {', '.join(others)}. Go back to the saved "
            "config.yaml, choose another run.name, or set run.resume=changed to go on with the new settings"
        )


def _check_logs(folder: Path, iterations: int, every: int) -> None:
    """ConfigError if checkpoints or rows are lost, or if the run is longer than `iterations`. every: the saved
    run.checkpoint_every."""
    path = checkpoint.latest(folder)
    rows = MetricsLog(folder / "metrics.jsonl").rows()
    evaluations = MetricsLog(folder / "evaluations.jsonl").rows()
    # the row of an iteration is written before its checkpoint: a kill between the two lost nothing that had been saved
    if path is None and rows and (rows[-1]["step"] > every or (folder / "summary.json").exists()):
        raise ConfigError(
            f"{folder} was trained to iteration {rows[-1]['step']}, but {folder / 'checkpoints'} holds no checkpoint: "
            "restore them, or choose another run.name to start anew"
        )
    if path is None:
        return
    done = checkpoint.step_of(path)
    if done > iterations:
        raise ConfigError(
            f"got run.iterations={iterations}, but {folder} is already at iteration {done}; expected at least that: "
            "raise run.iterations, or choose another run.name"
        )
    complete = {"metrics": [row["step"] for row in rows[:done]] == list(range(1, done + 1)),
                "evaluations": [row["step"] for row in evaluations[:1]] == [0]}  # fmt: skip
    for name, is_complete in complete.items():
        if not is_complete:
            raise ConfigError(
                f"{folder / name}.jsonl lacks rows, though the run is at iteration {done}: restore it, or choose "
                "another run.name"
            )


def differences(old: Any, new: Any, prefix: str = "") -> Changes:
    """Where two nests of dicts, and of lists of equal length, differ: {dotted key: (old, new)}; None where a key is
    absent."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(number): value for number, value in enumerate(values)} for values in (old, new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    changes: Changes = {}
    for key in sorted(old.keys() | new.keys()):
        changes |= differences(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))
    return changes


def _provenance(folder: Path, changes: Changes, rewards: dict[str, Any] | None) -> dict[str, Any]:
    """What the run was begun with; "later" starts on other software or threads, or with rewards that score otherwise, and
    "changes" of settings. Both are printed, too."""
    packages = ("flowalign-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft", "rapidocr")
    now: dict[str, Any] = {
        "git": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: _version(name) for name in packages},
        **({} if rewards is None else {"rewards": rewards}),
    }
    file = folder / "provenance.json"
    first = read_json(file) or dict(now)
    later, changed = first.pop("later", []), first.pop("changes", [])
    if others := _others(first, now):
        print(f"note: {folder} was begun with other {', '.join(others)}: it may not go on bit for bit", flush=True)
        later = [*later, now] if all(_others(each, now) for each in later) else later
    if changes:
        path = checkpoint.latest(folder)
        iteration = 0 if path is None else checkpoint.step_of(path)
        for key, (old, new) in changes.items():
            print(f"note: {folder} goes on after iteration {iteration} with another {key}: {old} -> {new}", flush=True)
        settings = {key: {"from": old, "to": new} for key, (old, new) in changes.items()}
        entry = {"after_iteration": iteration, "settings": settings}
        changed = [*changed, entry] if entry not in changed[-1:] else changed
    return first | ({"later": later} if later else {}) | ({"changes": changed} if changed else {})


def _others(first: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys by which two starts differ, among those that both have; how long the trial of a reward took does not count."""
    both = first.keys() & now.keys()
    found = differences({key: first[key] for key in both}, {key: now[key] for key in both})
    return [key for key in found if not key.endswith(TIMES)]


def _commit() -> str | None:
    """Of the source folder; None without git, or outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    except OSError:
        return None
    return text.strip() or None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed (run from its source folder)"
