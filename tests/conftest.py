"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_sd3, tiny_sd15


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="session")
def tiny_sd15_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd15(tmp_path_factory.mktemp("tiny") / "sd15")


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the latents of a tiny pipeline fit at the size of a real model: its VAE does not reduce them."""
    monkeypatch.setattr("flowalign.config.sizes.machine_memory", lambda: 2**50)
