"""ZeRO-2 partitions what is trained and changes nothing else: DeepSpeed itself, two processes on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import is_deepspeed_available
from safetensors.torch import load_file

from flowalign.storage.metrics_log import read_rows

pytestmark = pytest.mark.skipif(not is_deepspeed_available(), reason="needs pip install deepspeed")


SMOOTH = "tests.helpers.policy_gradient.Brightness"  # a pixel that rounds otherwise changes a JPEG by a byte


def launch(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sharded_optimizers_step_as_whole_ones(tmp_path: Path) -> None:
    """Two of them in turn, clipped, with a warm-up; their state comes out whole, and goes in again bit for bit."""
    launch("tests.helpers.zero_steps", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for ours, plain in first["norms"]:
        assert ours == pytest.approx(plain, rel=1e-6)
    assert len(first["weights"]) == 8
    assert max(first["weights"]) <= 1e-6
    assert first["state"] <= 1e-6
    assert first["held"] <= (5 * 7 + 7 + 7 * 7 + 7 + 7 * 3 + 3 + 4) / 2  # half the weights, and padding
    assert first["kept elsewhere"] == 0
    assert (first["broken"], first["moved"]) == ("inf", 0)  # Run.step raises there
    assert first["resumed"] == 0 < first["went on"]
    assert "parameters took [0.0, 1.0] steps" in first["uneven"]


@pytest.mark.slow
def test_the_documented_command_runs_with_one_process(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The launcher, its environment and accelerate's own plugin: more processes than one it would put on GPUs."""
    subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/deepspeed_zero2.yaml",
            "--num_processes", "1", "--main_process_port", "0", "scripts/train.py", "tests/data/tiny.yaml",
            f"policy.path={tiny_pipeline}", f"run.output={tmp_path}",
        ],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=300, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "tiny" / "lora" / "adapter_model.safetensors").exists()


def tensors(checkpoint: Path) -> dict[str, dict]:
    return {part.stem: load_file(part) for part in checkpoint.glob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_run_under_zero2_is_the_same_run(tiny_pipeline: Path, tmp_path: Path, trained: str) -> None:
    """Three states for two processes: one micro-batch is nothing but padding. Also resumed: under ZeRO-2 bit for bit,
    and by the other launch either way."""

    def train(weights: str, name: str) -> tuple[list[dict], dict[str, dict]]:
        launch(
            "tests.helpers.sharded_run", weights, "tests/data/tiny.yaml", f"policy.path={tiny_pipeline}",
            f"run.output={tmp_path / name}", "run.ema_decay=0.5", "run.keep_checkpoints=3", f"policy.trainable={trained}",
            "trainer.init_args.regularizers.kl.beta=0", "trainer.init_args.optimizer.max_grad_norm=0.001",
            "trainer.init_args.micro_batch=1", "policy.roles.old.update=copy", "rollout.groups=3", f"reward={SMOOTH}",
        )  # fmt: skip
        folder = tmp_path / name / "tiny"
        assert (folder / "lora").exists() == (trained == "lora")
        return list(read_rows(folder / "metrics.jsonl")), tensors(folder / "checkpoints" / "step-3")

    def cut_short(name: str, source: str) -> None:
        shutil.copytree(tmp_path / source, tmp_path / name)
        for step in (2, 3):
            shutil.rmtree(tmp_path / name / "tiny" / "checkpoints" / f"step-{step}")

    rows, plain = train("replicated", "plain")
    ours, sharded = train("zero2", "zero")
    for one, two in zip(ours, rows, strict=True):
        assert one["optim/grad_norm"] == pytest.approx(two["optim/grad_norm"], rel=1e-5)
    close(sharded, plain)
    for name, source, weights in (
        ("again", "zero", "zero2"),
        ("left", "zero", "replicated"),
        ("came", "plain", "zero2"),
    ):
        cut_short(name, source)
        _, end = train(weights, name)
        close(end, plain)
        if name == "again":
            assert all(bool((end[part][key] == sharded[part][key]).all()) for part in end for key in end[part])


def close(ours: dict[str, dict], theirs: dict[str, dict]) -> None:
    assert ours.keys() == theirs.keys() >= {"role_policy", "role_old", "optimizer_policy", "ema"}
    for part, expected in theirs.items():
        assert ours[part].keys() == expected.keys()
        for name, tensor in expected.items():
            # fp32 sums in another order, through advantages; a mean in place of a sum would be 0.5
            assert (ours[part][name] - tensor).norm() <= 1e-4 * tensor.norm(), (part, name)
