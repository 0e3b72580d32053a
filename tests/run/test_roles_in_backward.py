"""Activation checkpointing recomputes a forward inside the backward: the loop runs it under the update's role (I10)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import build
from flowalign.config import load_config
from flowalign.loop import train
from flowalign.models import Policy
from flowalign.storage import checkpoint

CONFIG = str(Path(__file__).parents[1] / "data" / "contract.yaml")


def first_moments(pipeline: Path, output: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moments of both optimizers after one iteration: the gradients, averaged over its two updates."""
    overrides = [f"policy.path={pipeline}", f"run.output={output}", "run.iterations=1"]
    train(*load_config(CONFIG, overrides))
    tensors, _ = checkpoint.load(output / "contract" / "checkpoints" / "step-1")
    return {
        name: torch.cat([value.flatten() for key, value in tensors[f"optimizer_{name}"].items() if "exp_avg/" in key])
        for name in ("policy", "fake")
    }


def test_recomputed_activations_give_the_gradient_of_stored_ones(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role "fake" is trained by its own optimizer; its forward has left the role's context before the backward."""
    stored = first_moments(tiny_pipeline, tmp_path / "stored")
    load = build.load_policy

    def load_with_recomputation(*args: Any, **kwargs: Any) -> Policy:
        policy = load(*args, **kwargs)
        [network] = policy.modules().values()
        network.enable_gradient_checkpointing()
        return policy

    monkeypatch.setattr(build, "load_policy", load_with_recomputation)
    recomputed = first_moments(tiny_pipeline, tmp_path / "recomputed")
    for name, expected in stored.items():
        assert expected.norm() > 0
        error = float((recomputed[name] - expected).norm() / expected.norm())
        assert error < 1e-4, f"the gradient of {name!r} is wrong by {error:.1%}"
