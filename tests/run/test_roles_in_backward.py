"""policy.gradient_checkpointing computes a forward again inside the backward: under the role of the forward (I10)."""

from pathlib import Path

import pytest
import torch

from flowalign.config import load_config
from flowalign.loop import train
from flowalign.storage import checkpoint

CONFIG = str(Path(__file__).parents[1] / "data" / "contract.yaml")


def first_moments(pipeline: Path, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """AdamW's first moments of both optimizers after one iteration: the gradients, averaged over its two updates."""
    common = [f"policy.path={pipeline}", f"run.output={output}", "run.iterations=1"]
    train(*load_config(CONFIG, [*common, *overrides]))
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
    recomputed = first_moments(tiny_pipeline, tmp_path / "recomputed", "policy.gradient_checkpointing=true")
    for name, expected in stored.items():
        assert expected.norm() > 0
        assert torch.equal(recomputed[name], expected), name
