"""FSDP2 shards what is frozen and changes nothing else: two processes on the CPU, each family, fp32 and bf16."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign.data import as_records
from flowalign.distributed.fsdp2 import Lockstep, shard
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.models import Size, load_policy
from flowalign.storage.metrics_log import read_rows, without_time


def launch(home: Path, module: str, *arguments: str) -> str:
    """Runs the module in two processes; what they print."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module, *arguments],
        cwd=Path(__file__).parents[2],
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(home), "ACCELERATE_USE_CPU": "true"},
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("family", "dtype", "limit"),
    [
        ("sd3", "bf16", 1e-6),
        pytest.param("sd3", "fp32", 1e-6, marks=pytest.mark.slow),
        pytest.param("sd15", "fp32", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_network_gives_the_same_velocities_and_gradients(
    tiny_pipeline: Path, tiny_sd15_pipeline: Path, tmp_path: Path, family: str, dtype: str, limit: float
) -> None:
    pipeline = {"sd3": tiny_pipeline, "sd15": tiny_sd15_pipeline}[family]
    launch(tmp_path, "tests.helpers.sharded_network", str(pipeline), dtype, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for found in (first, second):
        assert found["velocity"] <= limit
        assert found["gradient"] <= limit
    # three roles: once against three times; a gradient each; then only the first process calls
    assert (first["dummy_calls"], second["dummy_calls"]) == (6, 1)
    assert first["calls"] == second["calls"] == 11
    assert first["held"] + second["held"] == 1
    assert 0.4 < first["held"] < 0.6
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "lora" / name), load_file(tmp_path / "twin" / name)
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[key] == theirs[key]).all()) for key in ours)


@pytest.mark.slow
def test_a_sharded_run_is_the_same_run(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Three groups and five images for two processes, states one by one: the second has more to do each time."""
    printed = {}
    for weights in ("replicated", "fsdp2"):
        printed[weights] = launch(
            tmp_path, "tests.helpers.sharded_run", weights, "tests/data/tiny.yaml", f"policy.path={tiny_pipeline}",
            f"run.output={tmp_path / weights}", "run.ema_decay=0.5", "rollout.groups=3", "rollout.micro_batch=1",
            "evaluation.count=5", "evaluation.batch_size=1",
        )  # fmt: skip
    dummy_calls = sorted(int(number) for number in re.findall(r"dummy calls: (\d+)", printed["fsdp2"]))
    assert dummy_calls[0] == 0 < dummy_calls[1]
    folders = [tmp_path / weights / "tiny" for weights in ("replicated", "fsdp2")]
    rows = [[without_time(row) for row in read_rows(folder / "metrics.jsonl")] for folder in folders]
    assert rows[0] == rows[1]
    one, two = (load_file(folder / "lora" / "adapter_model.safetensors") for folder in folders)
    assert all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.parametrize(
    ("called", "others", "message"),
    [
        (False, [1.0, 0.0], "never called the sharded network"),
        (True, [1.0, 1.0], r"no call with gradients left .* Processes\.deal"),
    ],
)
def test_calls_that_cannot_be_answered(
    monkeypatch: pytest.MonkeyPatch, called: bool, others: list[float], message: str
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.add_(torch.tensor(others)))
    lockstep = Lockstep(torch.nn.Linear(2, 2), "cpu")
    if called:
        lockstep.network(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=message):
        lockstep.level()


def test_trained_weights_are_not_sharded(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="full")
    with pytest.raises(ConfigError, match=r"expected one network that is frozen but for its adapters"):
        shard(policy, Processes())


def test_a_network_that_will_be_sharded_is_loaded_on_another_device(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none", network_device="meta")
    assert {p.device.type for p in policy.modules()["transformer"].parameters()} == {"meta"}
    latents = torch.zeros(1, *policy.latent_shape(Size(24, 48)))
    assert (
        policy.decode(latents).device.type == policy.encode(as_records(["KITE"])).tensors["embeds"].device.type == "cpu"
    )
