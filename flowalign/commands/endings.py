"""How a command ends: which errors are a sentence, and the exit code. Any other error is a defect and keeps its traceback."""

from __future__ import annotations

import errno
import re

AGAIN = "The same command goes on from the last checkpoint"


def ending(error: BaseException) -> tuple[int, str] | None:
    """(exit code, what to print) of an error that a user can mend; None for one that has to be mended in the code.

    Codes: 2 what was asked for cannot work, 1 the run was stopped by what it met, 130 by Ctrl-C or SIGTERM."""
    import torch
    from safetensors import SafetensorError

    from flowalign.errors import ConfigError, RunError
    from flowalign.storage.checkpoint import CheckpointError
    from flowalign.storage.files import DamagedFile
    from rewards import RewardError

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
            "rollout.micro_batch, trainer.micro_batch, evaluation.batch_size or policy.decode_batch: they change memory and "
            f"speed only. {AGAIN}"
        )
    if isinstance(error, OSError | SafetensorError) and _is_disk_error(error):
        return 1, f"stopped: {error}. Free the disk; {AGAIN[0].lower()}{AGAIN[1:]}"
    return None


def _is_cpu_memory(error: BaseException) -> bool:
    """torch has no type of its own for it on the CPU."""
    return (
        isinstance(error, RuntimeError)
        and re.search(r"can't allocate memory|not enough memory", str(error)) is not None
    )


def _is_disk_error(error: Exception) -> bool:
    """Whether the disk is full, over its quota, read-only or failing; safetensors gives the number in its message only."""
    match = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else 0
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
