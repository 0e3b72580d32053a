"""Fixtures shared by all tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.forks import Forks
from tests.helpers.tiny import tiny_sd3, tiny_sd15


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd15_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("tiny") / "sd15")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs programs, also in several processes, without the seconds that an interpreter needs to import."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the latents of a tiny pipeline fit at the size of a real model: its VAE does not reduce them."""
    monkeypatch.setattr("flowalign.config.sizes.machine_memory", lambda: 2**50)


@pytest.fixture(scope="session")
def finished(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished run of one iteration."""
    from tests.helpers.tiny_run import run_it

    output = tmp_path_factory.mktemp("finished")
    run_it(tiny_pipeline, output, "run.iterations=1")
    return output


@pytest.fixture
def finished_run(finished: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the finished run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tiny"
