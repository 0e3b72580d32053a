"""`scripts/evaluate.py` on two processes leaves what one leaves, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.files import contents


def launch(count: int, arguments: list[str], home: Path) -> str:
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    environment = {
        "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(home), "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *runner, "scripts/evaluate.py", *arguments], cwd=Path(__file__).parents[2], env=environment,
        timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_leave_what_one_does(finished_run: Path, tmp_path: Path) -> None:
    """Two columns of three parts each, the last ones smaller; a groupwise reward."""
    arguments = [str(finished_run), "--count", "70", "--samples", "2", "--batch-size", "7",
                 "--rewards", "rewards.JPEGCompressibility", "rewards.GroupDiversity", "--output"]  # fmt: skip
    launch(1, [*arguments, str(tmp_path / "one")], tmp_path)
    text = launch(2, [*arguments, str(tmp_path / "two")], tmp_path)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len([path for path in one if path.startswith("parts/") and path.endswith(".safetensors")]) == 6
    assert one.keys() == two.keys() and [path for path in one if one[path] != two[path]] == []
    assert text.count("group/distance (held out)") == 1  # one process prints
