"""The command line: `flowalign train | doctor | benchmark CONFIG … [key=value …]`."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import BinaryIO, TextIO

USAGE = """usage: flowalign train CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign doctor CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign benchmark CONFIG.yaml [CONFIG.yaml ...] [--iterations N] [--variants NAME,NAME] [--output FOLDER]
                           [key=value ...]

Trains as the files say, later files over earlier ones (configs/methods/… configs/models/… configs/rewards/…); dotted keys
override them, for example rollout.group_size=24 run.name=wide. The doctor measures in about a minute whether that can
work: one line per check, exit code 1 if one fails. The benchmark times an iteration beside the same iteration with less
sharing.
On several devices: accelerate launch scripts/train.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...]"""


HELP = ("-h", "--help")


def usage(arguments: Sequence[str]) -> int:
    """Prints how the command is used. Exit code: 0 if that was asked for, else 2."""
    asked = bool(arguments) and arguments[0] in HELP
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


class IgnoresBrokenPipe:
    """Ignores BrokenPipeError: if `tee` exits on Ctrl-C, output is dropped and the run still saves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop_output()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop_output()

    def _drop_output(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    # what else progress bars, loggers and trackers read of a stream

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    @property
    def errors(self) -> str | None:
        return self._stream.errors

    @property
    def closed(self) -> bool:
        return self._stream.closed

    @property
    def buffer(self) -> BinaryIO:
        return self._stream.buffer

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True


def train(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 stopped by an error in the run, 2 a configuration that cannot work, 130 interrupted."""
    if not arguments or arguments[0] in HELP:
        return usage(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from safetensors import SafetensorError

    from flowalign.config import load_config
    from flowalign.config_layers import split_arguments
    from flowalign.errors import ConfigError
    from flowalign.loop import train as run
    from flowalign.storage.checkpoint import CheckpointError

    with redirect_stdout(IgnoresBrokenPipe(sys.stdout)), redirect_stderr(IgnoresBrokenPipe(sys.stderr)):
        try:
            run(*load_config(*split_arguments(arguments)))
        except ConfigError as error:
            print(f"configuration error: {error}", file=sys.stderr)
            return 2
        except CheckpointError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        except (OSError, SafetensorError) as error:
            if not _is_disk_error(error):
                raise
            print(
                f"stopped: {error}. Free the disk; the same command goes on from the last checkpoint", file=sys.stderr
            )
            return 1
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped at once; the last checkpoint stands", file=sys.stderr)
            return 130
    return 0


def _is_disk_error(error: Exception) -> bool:
    """Whether the disk is full, over its quota, read-only or failing; safetensors gives the number in its message only."""
    match = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else 0
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def doctor(arguments: Sequence[str]) -> int:
    """Prints each finding once it is known. Exit code: 0 all well, 1 a failure, 2 no configuration was named."""
    if not arguments or arguments[0] in HELP:
        return usage(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers.utils.logging
    import transformers.utils.logging

    from flowalign.config_layers import split_arguments
    from flowalign.diagnostics.doctor import diagnose

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    well = True
    for finding in diagnose(*split_arguments(arguments)):
        print(finding, flush=True)
        well = well and finding.ok is True
    return 0 if well else 1


def benchmark(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 stopped by a reward that fails, 2 a configuration that cannot work."""
    if not arguments or arguments[0] in HELP:
        return usage(arguments)
    from flowalign.diagnostics.benchmark import main as run
    from flowalign.errors import ConfigError
    from rewards import RewardError

    try:
        run(arguments)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        return 2
    except RewardError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


COMMANDS = {"train": train, "doctor": doctor, "benchmark": benchmark}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.exit(COMMANDS[arguments[0]](arguments[1:]))
    sys.exit(usage(arguments))


if __name__ == "__main__":
    main()
