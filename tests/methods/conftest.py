"""The bed of tests/helpers/bed.py: its pipeline, and Flow-GRPO on it."""

from pathlib import Path

import pytest
import torch

from tests.helpers.bed import save_pipeline
from tests.helpers.bed_run import Bed


@pytest.fixture(scope="package")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="package")
def bed(pipeline: Path) -> Bed:
    """Flow-GRPO with a correction other than 0; for tests that step no weight."""
    bed = Bed.of(pipeline, ["configs/methods/flow_grpo.yaml"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in bed.policy.trainable_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return bed
