"""The command line: `flowalign train | doctor | benchmark CONFIG … [key=value …]`."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO

USAGE = """usage: flowalign train CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign doctor CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign benchmark CONFIG.yaml [CONFIG.yaml ...] [--iterations N] [--variants NAME,NAME] [--output FOLDER]
                           [key=value ...]

Trains as the files say, later files over earlier ones (configs/methods/… configs/models/… configs/rewards/…); dotted keys
override them, for example rollout.group_size=24 run.name=wide. The doctor measures in about a minute whether that can
work: one line per check, exit code 1 if one fails. The benchmark times an iteration beside the same iteration with less
sharing.
On several devices: accelerate launch scripts/train.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...]"""


class Unbroken:
    """A stream whose reader may go first, as `| tee log` does on Ctrl-C: then it is heard no more, and the run goes on to
    save what it has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._into_nothing(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._into_nothing(0)

    def _into_nothing(self, count: int) -> int:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def train(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 stopped by an error in the run, 2 a configuration that cannot work, 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from safetensors import SafetensorError

    from flowalign.config import load_config
    from flowalign.errors import ConfigError
    from flowalign.layers import split_arguments
    from flowalign.loop import train as run
    from flowalign.storage.checkpoint import CheckpointError

    with redirect_stdout(Unbroken(sys.stdout)), redirect_stderr(Unbroken(sys.stderr)):
        try:
            run(*load_config(*split_arguments(arguments)))
        except ConfigError as error:
            print(f"configuration error: {error}", file=sys.stderr)
            return 2
        except CheckpointError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        except (OSError, SafetensorError) as error:
            if not _of_the_disk(error):
                raise
            print(f"stopped: {error}. Mend that; the same command goes on from the last checkpoint", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped at once; the last checkpoint stands", file=sys.stderr)
            return 130
    return 0


def _of_the_disk(error: Exception) -> bool:
    """Whether it is full, over the quota, read-only or failing; safetensors tells in words only."""
    said = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else 0
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def doctor(arguments: Sequence[str]) -> int:
    """Prints the findings as they come. Exit code: 0 all well, 1 a failure, 2 no configuration was named."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers.utils.logging
    import transformers.utils.logging

    from flowalign.diagnostics.doctor import diagnose
    from flowalign.layers import split_arguments

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    well = True
    for finding in diagnose(*split_arguments(arguments)):
        print(finding, flush=True)
        well = well and finding.ok is True
    return 0 if well else 1


def benchmark(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 stopped by a reward that fails, 2 a configuration that cannot work."""
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
    print(USAGE, file=sys.stdout if arguments[:1] in (["-h"], ["--help"]) else sys.stderr)
    sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    main()
