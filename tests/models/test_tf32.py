"""fp32 products run in TF32 once a policy was loaded onto a GPU, and never because of one on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign.models import load_policy
from flowalign.models.load import read_pipeline


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("device", "allowed"), [(None, False), ("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_only_a_gpu_gets_tf32(
    tiny_pipeline: Path, device: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # there is no GPU to go to
    before = torch.backends.mkldnn.matmul.fp32_precision
    load_policy(str(tiny_pipeline), device=device)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # the CPU's own


def test_a_live_pipeline_leaves_the_process_as_its_user_set_it(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = read_pipeline(str(tiny_pipeline))
    monkeypatch.setattr(type(pipe.vae), "device", torch.device("cuda"))
    load_policy(pipe, trainable="none")
    assert torch.backends.cuda.matmul.allow_tf32 is False
