"""Checkpoints in a format of safetensors and JSON that a crash at any moment cannot leave half written.

    <run>/checkpoints/step-N/<section>.safetensors    one file per section of tensors (model, optimizer, ema, …)
                             state.json               everything that is not a tensor
                             manifest.json            format, step, and size and SHA-256 of every other file

A checkpoint is written as `.tmp-step-N`, fsynced, then renamed: a folder named step-N is complete. Nothing is pickled,
and randomness being a function of keys, there is no RNG state to keep. One process saves.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from flowalign.storage.files import fsync
from flowalign.storage.finite import first_not_finite

FORMAT = 1
POINTS = ("part_written", "before_rename", "after_rename", "before_prune")  # where `hooks` is called, for kill tests
State = dict[str, Any]
Tensors = dict[str, Tensor]
Hook = Callable[[str], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, or that does not fit the model; says which part and what to do."""


def save(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: State,
    *,
    keep: int = 2,
    hooks: Hook | None = None,
) -> Path:
    """Writes checkpoints/step-`step` and keeps the last `keep`; returns its folder.

    `tensors` maps section -> name -> tensor, `state` is JSON that survives a round trip (text keys, lists, no NaN).
    Saving the same step again with the same content does nothing. Raises CheckpointError if the step exists with
    other content, a later one exists, or a tensor is not finite; what was saved before stands."""
    if keep < 1:
        raise CheckpointError(f"got keep={keep}; expected the number of checkpoints to keep, at least 1")
    _check_finite(step, tensors)
    call = hooks or (lambda point: None)
    root = Path(run_folder) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    fsync(root.parent)
    _sweep(root)
    later = [path.name for path in _folders(root) if step_of(path) > step]
    if later:
        raise CheckpointError(
            f"cannot save step {step}: {root} already holds {', '.join(later)}: remove the later checkpoints"
        )
    temporary, final = root / f".tmp-step-{step}", root / f"step-{step}"
    _write(temporary, step, tensors, state, call)
    call("before_rename")
    if final.exists():
        _keep_equal(temporary, final)
    else:
        temporary.rename(final)
    fsync(root)
    call("after_rename")
    _prune(root, keep, call)
    return final


def tidy(run_folder: Path, keep: int) -> None:
    """Finishes what a kill in the last `save` left undone: removes temporary folders and all but the last `keep`."""
    root = Path(run_folder) / "checkpoints"
    _sweep(root)
    _prune(root, keep, lambda point: None)


def latest(run_folder: Path) -> Path | None:
    """The folder of the highest complete step of a run; None if it has none. Does not read it: `load` does."""
    folders = _folders(Path(run_folder) / "checkpoints")
    return folders[-1] if folders else None


def load(path: Path, sections: Collection[str] | None = None) -> tuple[dict[str, Tensors], State]:
    """Reads a step-N folder back, every file that is read checked against the manifest; tensors on the CPU. sections: which
    to read; None: all.

    Raises CheckpointError naming the file that is missing, cut short, changed or not of this checkpoint."""
    path = Path(path)
    parts = _read_manifest(path)
    listed = set(parts)
    lacks = [name for name in sections or () if f"{name}.safetensors" not in parts]
    if lacks:
        raise CheckpointError(f"{path} holds no {', '.join(lacks)}: it is of a run that keeps none")
    wanted = set(parts) if sections is None else {"state.json", *(f"{name}.safetensors" for name in sections)}
    parts = {name: part for name, part in parts.items() if name in wanted}
    for name, expected in parts.items():
        _check_part(path, name, expected)
    unlisted = sorted({file.name for file in path.iterdir()} - listed - {"manifest.json"})
    if unlisted:
        raise CheckpointError(f"{path / unlisted[0]} is not listed in manifest.json: remove it or {_remedy(path)}")
    files = [path / name for name in parts if name.endswith(".safetensors")]
    return {file.stem: load_file(file) for file in files}, json.loads((path / "state.json").read_text())


def sha256_of(path: Path, section: str) -> str:
    """Of a section of a step-N folder, as its manifest says. CheckpointError without one."""
    parts = _read_manifest(path)
    if f"{section}.safetensors" not in parts:
        raise CheckpointError(f"{path} holds no {section}: it is of a run that keeps none")
    return str(parts[f"{section}.safetensors"]["sha256"])


def steps(run_folder: Path) -> list[int]:
    """The complete steps of a run, by rising number."""
    return [step_of(path) for path in _folders(Path(run_folder) / "checkpoints")]


def step_of(path: Path) -> int:
    """The N of a folder step-N."""
    return int(Path(path).name.removeprefix("step-"))


def _folders(root: Path) -> list[Path]:
    """The step-N folders by rising N; temporary folders are not among them."""
    return sorted((path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def _sweep(root: Path) -> None:
    for stale in root.glob(".tmp-*"):
        shutil.rmtree(stale)


def _prune(root: Path, keep: int, call: Hook) -> None:
    for old in _folders(root)[:-keep]:
        call("before_prune")
        _remove(old)


def _check_finite(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    name = first_not_finite((f"{section}, {name}", t) for section, part in tensors.items() for name, t in part.items())
    if name is not None:
        raise CheckpointError(
            f"got {name} with a value that is not finite; expected finite numbers: nothing was saved at step {step}, the "
            "checkpoint before it stands; lower trainer.optimizer.lr, or check the settings of the optimizer and the losses"
        )


def _write(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State, call: Hook) -> None:
    folder.mkdir()
    parts = {}
    for section, content in tensors.items():
        if not re.fullmatch(r"[\w-]+", section):
            raise CheckpointError(f"got section {section!r}; expected letters, digits, _ and -, since it names a file")
        file = folder / f"{section}.safetensors"
        save_file({name: _plain(section, name, tensor) for name, tensor in content.items()}, file)
        call("part_written")
        parts[file.name] = _describe(file)
    (folder / "state.json").write_text(_to_json(state))
    parts["state.json"] = _describe(folder / "state.json")
    (folder / "manifest.json").write_text(_to_json({"format": FORMAT, "step": step, "parts": parts}))
    for file in folder.iterdir():
        fsync(file)
    fsync(folder)


def _plain(section: str, name: str, tensor: Tensor) -> Tensor:
    """A contiguous CPU copy: safetensors refuses views and shared memory."""
    if type(tensor) not in (Tensor, Parameter):
        raise CheckpointError(
            f"{section}, {name}: got a {type(tensor).__name__} (sharded or wrapped weights, as of FSDP2); expected a plain "
            "tensor: gather it before saving"
        )
    return tensor.detach().to("cpu", copy=True).contiguous()


def _to_json(value: State) -> str:
    try:
        text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"got a state that is not JSON ({error}); expected JSON: put tensors into a section"
        ) from error
    if json.loads(text) != value:
        raise CheckpointError(
            "got a state that a JSON round trip changes; expected text keys, and lists in place of tuples"
        )
    return text


def _describe(file: Path) -> State:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _keep_equal(temporary: Path, final: Path) -> None:
    if (temporary / "manifest.json").read_bytes() != (final / "manifest.json").read_bytes():
        raise CheckpointError(f"{final} exists with other content; resume from it, remove it, or use a new run folder")
    shutil.rmtree(temporary)


def _remove(folder: Path) -> None:
    """Renames before deleting, so that a crash in between leaves a stale temporary folder, not half a checkpoint."""
    renamed = folder.with_name(f".tmp-old-{folder.name}")
    folder.rename(renamed)
    shutil.rmtree(renamed)


def _read_manifest(path: Path) -> dict[str, State]:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        found, step, parts = manifest["format"], manifest["step"], manifest["parts"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: not a checkpoint of flowalign; {_remedy(path)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is unreadable ({error!r}); {_remedy(path)}") from error
    if found != FORMAT:
        raise CheckpointError(
            f"got format {found!r} in {file}; expected {FORMAT}: use the version of flowalign that wrote it"
        )
    if f"step-{step}" != path.name:
        raise CheckpointError(f"{file} is of step {step}, but its folder is {path.name}; give the folder its own name")
    if "state.json" not in parts:
        raise CheckpointError(f"{file} lists no state.json; {_remedy(path)}")
    return parts


def _check_part(path: Path, name: str, expected: State) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; {_remedy(path)}")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{file} has {size} bytes, expected {expected['bytes']}; {_remedy(path)}")
    if _describe(file) != expected:
        raise CheckpointError(f"{file} was changed after it was written (SHA-256 differs); {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"restore it from a copy, or remove {path} to resume from an earlier checkpoint"
