"""How a command ends: which errors are a sentence, and the exit code. Any other error is a defect and keeps its traceback."""

from __future__ import annotations

import errno
import re

import torch
from safetensors import SafetensorError

from flowalign.errors import ConfigError, RunError
from flowalign.storage.checkpoint import CheckpointError
from flowalign.storage.files import DamagedFile
from rewards import RewardError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # full, over its quota, read-only or failing
PLACE = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.ELOOP)
AGAIN = "The same command goes on from the last checkpoint"


def ending(error: BaseException) -> tuple[int, str] | None:
    """(exit code, what to print) of an error that a user can mend; None for one that has to be mended in the code.

    Codes: 2 what was asked for cannot work, 1 the run was stopped by what it met, 130 by Ctrl-C or SIGTERM."""
    if isinstance(error, ConfigError):
        return 2, f"configuration error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "stopped at once; the last checkpoint stands"
    if isinstance(error, CheckpointError | DamagedFile | RunError | FloatingPointError):
        return 1, f"stopped: {error}"
    if isinstance(error, RewardError):
        return 1, f"stopped: {error}. {AGAIN}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_cpu_memory(error):
        return 1, (
            f"stopped: out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Lower "
            "rollout.micro_batch, trainer.micro_batch, evaluation.batch_size or policy.decode_batch, or --batch-size where the command "
            f"has it: they change memory and speed only. {AGAIN}"
        )
    if isinstance(error, OSError | SafetensorError):
        number = _number(error)
        if number in DISK:
            return 1, f"stopped: {error}. Free the disk; {AGAIN[0].lower()}{AGAIN[1:]}"
        if number in PLACE:
            return (
                1,
                f"stopped: {error}. Make room for what is written there, or readable what is read; then the same command",
            )
    return None


def _is_cpu_memory(error: BaseException) -> bool:
    """torch has no type of its own for it on the CPU."""
    return (
        isinstance(error, RuntimeError)
        and re.search(r"can't allocate memory|not enough memory", str(error)) is not None
    )


def _number(error: OSError | SafetensorError) -> int | None:
    """safetensors gives the number in its message only."""
    match = re.search(r"os error (\d+)", str(error))
    return error.errno if isinstance(error, OSError) else int(match[1]) if match else None
