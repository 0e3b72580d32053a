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
