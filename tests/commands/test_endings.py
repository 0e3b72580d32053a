"""Every error that a user can mend ends a command in one sentence; nothing else hides its traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from flowalign import cli
from flowalign.commands.endings import ending
from flowalign.errors import ConfigError, RunError
from flowalign.run.interrupt import Interrupted
from flowalign.storage.checkpoint import CheckpointError
from flowalign.storage.files import DamagedFile
from rewards import RewardError
from tests.helpers.tiny_run import CONFIG


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (ConfigError("run.seed=-1"), 2, "configuration error: run.seed=-1"),
        (RewardError("reward 'ocr' failed"), 1, "reward 'ocr' failed. The same command goes on"),
        (RunError("got loss nan"), 1, "stopped: got loss nan"),
        (FloatingPointError("got a step of length nan"), 1, "stopped: got a step"),
        (CheckpointError("the checkpoint lacks 1"), 1, "stopped: the checkpoint lacks"),
        (DamagedFile("metrics.jsonl, line 1"), 1, "stopped: metrics.jsonl"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), 1, "Tried to). Lower rollout.micro_batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory (MemoryError)"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 1, "Free the disk; the same command"),
        (SafetensorError("Read-only file system (os error 30)"), 1, "Free the disk"),
        (Interrupted("stopped after iteration 2"), 130, "stopped after iteration 2"),
        (KeyboardInterrupt(), 130, "stopped at once; the last checkpoint stands"),
    ],
)
def test_an_error_of_a_run_is_a_sentence(
    error: BaseException, code: int, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr("flowalign.loop.open_run", fails)
    assert cli.train([CONFIG]) == code
    printed = capsys.readouterr().err.strip()
    assert part in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shapes"), ConnectionResetError(errno.ECONNRESET, "x")]
)
def test_another_error_keeps_its_traceback(error: Exception) -> None:
    assert ending(error) is None


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (
            "frobnicate",
            "unknown command 'frobnicate': Commands: train, evaluate, optimize-noise, compare, forecast, doctor",
        ),
        ("trian", "did you mean 'train'?"),
    ],
)
def test_an_unknown_command_is_said_to_be_unknown(
    command: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flowalign", command, "configs/quickstart.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and part in capsys.readouterr().err


def test_a_module_in_the_working_directory_is_a_part_and_replaces_none_of_ours(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    """`rewards.py` and `yaml.py` there would break what is installed, if they came first."""
    (tmp_path / "my_parts.py").write_text(
        "from dataclasses import dataclass\nfrom rewards import JPEGCompressibility\n\n"
        "@dataclass(frozen=True)\nclass Sharp(JPEGCompressibility):\n    name: str = 'sharp'\n"
    )
    for name in ("rewards.py", "yaml.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "scripts" / "train.py"), CONFIG, f"policy.path={tiny_pipeline}"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    overrides = ["reward=my_parts.Sharp", "run.iterations=1"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()
