"""The public names, and the guard against a stranger's module named samplers or rewards."""

import inspect
import subprocess
import sys
from pathlib import Path

import flowalign


def test_every_public_name_can_be_had_again_and_again() -> None:
    for name in flowalign.__all__ * 2:  # once a submodule is imported, the package has it as an attribute of that name
        assert not inspect.ismodule(vars(flowalign).get(name)) and callable(flowalign.__getattr__(name))


def test_a_strangers_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import flowalign"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode != 0 and "'rewards'" in done.stderr and "not flowalign's" in done.stderr
