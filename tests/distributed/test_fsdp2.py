"""FSDP2 shards weights and changes nothing else: two processes on the CPU, each family, fp32 and bf16, LoRA and full weights."""

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowalign.data import as_records
from flowalign.distributed.fsdp2 import Lockstep, shard
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.models import Size, load_policy
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.testing import tiny_pipeline as tiny
from tests.helpers.forks import Forks
from tests.helpers.two_networks import save_pipeline, save_prompts

Launch = Callable[..., str]


@pytest.fixture
def launch(forks: Forks) -> Launch:
    """Runs a module with arguments in two processes, or `count`; what they print."""
    return partial(forks.check, "-m", environment={"ACCELERATE_USE_CPU": "true"}, count=2)


@pytest.mark.parametrize(
    ("family", "dtype", "limit"),
    [
        ("sd3", "bf16", 1e-6),
        pytest.param("sd3", "fp32", 1e-6, marks=pytest.mark.slow),
        pytest.param("sd15", "fp32", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_network_gives_the_same_velocities_and_gradients(
    launch: Launch, tiny_pipeline: Path, tiny_sd15_pipeline: Path, tmp_path: Path, family: str, dtype: str, limit: float
) -> None:
    pipeline = {"sd3": tiny_pipeline, "sd15": tiny_sd15_pipeline}[family]
    launch("tests.helpers.sharded_network", str(pipeline), dtype, str(tmp_path))
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
@pytest.mark.parametrize("networks", [1, 2])
def test_a_sharded_run_is_the_same_run(launch: Launch, tiny_pipeline: Path, tmp_path: Path, networks: int) -> None:
    """Three groups for two processes, and images for which one has more to do than the other, states one by one. With two
    networks, which a boundary in σ divides, guided and with source images."""
    printed, pipeline, extra = {}, tiny_pipeline, ["evaluation.count=5"]
    if networks == 2:
        pipeline, prompts = save_pipeline(tmp_path / "pipeline"), save_prompts(tmp_path)
        extra = [
            "evaluation.count=3", f"prompts={prompts}", f"evaluation.prompts={prompts}",
            "evaluation.allow_training_prompts=true", "policy.lora.targets=null",
            "policy.family=tests.helpers.two_networks.FAMILY", "rollout.guidance_scale=2",
            "rollout.allow_cfg_update=true", "rollout.plan={class_path: samplers.Chain}",
        ]  # fmt: skip
    for weights in ("replicated", "fsdp2"):
        printed[weights] = launch(
            "tests.helpers.sharded_run", weights, "tests/data/tiny.yaml", f"policy.path={pipeline}",
            f"run.output={tmp_path / weights}", "run.ema_decay=0.5", "rollout.groups=3", "rollout.micro_batch=1",
            "evaluation.batch_size=1", *extra,
        )  # fmt: skip
    dummy_calls = sorted(int(number) for number in re.findall(r"dummy calls: (\d+)", printed["fsdp2"]))
    assert dummy_calls[0] > 0  # the first process has more groups, the second more images to evaluate
    folders = [tmp_path / weights / "tiny" for weights in ("replicated", "fsdp2")]
    rows = [[without_time(row) for row in read_rows(folder / "metrics.jsonl")] for folder in folders]
    assert rows[0] == rows[1]
    one, two = (load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in folders)
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
    lockstep = Lockstep([torch.nn.Linear(2, 2)], "cpu")
    if called:
        lockstep.networks[0](torch.ones(3, 2))
    with pytest.raises(RuntimeError, match=message):
        lockstep.level()


def test_calls_are_answered_under_the_autocast_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are trained in bf16 are gathered in bf16, and called with fp32 latents."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: None)
    lockstep = Lockstep([torch.nn.Linear(2, 2, dtype=torch.bfloat16)], "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        lockstep.networks[0](torch.ones(3, 2))
    others = iter([[1.0, 0.0], [0.0, 0.0]])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.add_(torch.tensor(next(others))))
    lockstep.level()
    assert lockstep.dummy_calls == 1


@pytest.mark.parametrize("name", ["flux1_dev", "flux2_klein_base", "sdxl", "z_image", "qwen_image", "sd3"])
def test_any_network_is_answered_with_one_row(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Positions of tokens have no rows, those of SDXL's sizes are in a dictionary, those of Z-Image in lists."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: None)
    policy = load_policy(tiny(name), trainable="none")
    (network,) = policy.networks()
    lockstep = Lockstep([network], "cpu")
    answers: list[object] = []
    x = torch.randn(3, *policy.latent_shape(Size(64, 64)))
    conditions = policy.encode(as_records(["a", "bc", "def"]))
    with torch.no_grad():
        policy.velocity(x, torch.full((3,), 0.5), conditions)
    others = iter([[1.0, 0.0], [0.0, 0.0]])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.add_(torch.tensor(next(others))))
    network.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    lockstep.level()
    assert [len(answer) for answer in answers] == [1]  # type: ignore[arg-type]


def test_processes_that_call_different_networks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes in two threads, as all_reduce would join them: every forward of a network is made by both, in one order,
    and each has its own result."""
    barrier, sums = threading.Barrier(2, timeout=20), {}

    def all_reduce(sent: torch.Tensor) -> None:
        sums[threading.get_ident()] = sent.clone()
        barrier.wait()
        total = sum(sums.values())
        barrier.wait()
        sent.copy_(total)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    plans = (
        [0, 1, 1],
        [0, 0, 0, 1],
    )  # the first has gone on to the second network while the other is still at the first
    forwards: list[list[int]] = [[], []]
    results: list[list[float]] = [[], []]

    def process(rank: int) -> None:
        networks = [torch.nn.Linear(2, 2) for _ in range(2)]
        for number, network in enumerate(networks):
            torch.nn.init.constant_(network.weight, number + 1.0)
            torch.nn.init.zeros_(network.bias)
        lockstep = Lockstep(networks, "cpu")
        for number, network in enumerate(networks):
            network.register_forward_hook(lambda *_, number=number: forwards[rank].append(number))
        with torch.no_grad():
            for call, number in enumerate(plans[rank]):
                results[rank].append(float(networks[number](torch.full((1, 2), call + 1.0))[0, 0]))
            lockstep.level()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert forwards[0] == forwards[1] == [0, 0, 0, 1, 1]
    assert results == [[2.0, 8.0, 12.0], [2.0, 4.0, 6.0, 16.0]]


def test_different_networks_with_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sent: sent.add_(torch.tensor([1.0, 0.0, 1.0])))
    lockstep = Lockstep([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], "cpu")
    with pytest.raises(RuntimeError, match="or makes it of another network"):
        lockstep.networks[1](torch.ones(3, 2))


@pytest.mark.parametrize(
    ("dtype", "kind", "limit", "moved"),
    [
        ("fp32", "full", 1e-6, 1e-6),
        pytest.param("bf16", "full", 1e-2, 0.015, marks=pytest.mark.slow),  # of bf16 rounding
        pytest.param("fp32", "hybrid", 1e-6, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_trained_weights_are_sharded_and_step_as_whole_ones(
    launch: Launch, tiny_pipeline: Path, tmp_path: Path, dtype: str, kind: str, limit: float, moved: float
) -> None:
    """Each process has its part of all networks, roles among them, and of optimizer and average; their gradients add up. hybrid:
    four processes on two machines, of which each has all parts."""
    count = 4 if kind == "hybrid" else 2
    launch("tests.helpers.sharded_network", str(tiny_pipeline), dtype, str(tmp_path), kind, count=count)
    everyone = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert sum(found["held"] for found in everyone) == pytest.approx(count / 2)
    for found in everyone:
        assert found["velocity"] <= limit and found["weights"] <= moved < found["moved"] / 5
        assert found["norms"] == pytest.approx(found["expected"], rel=max(limit, 1e-5))
    ours, theirs = (load_file(file) for file in sorted(tmp_path.glob("*/transformer/*.safetensors")))
    assert ours.keys() == theirs.keys()
    assert all(float((ours[name] - theirs[name]).norm()) <= 2 * moved * float(theirs[name].norm()) for name in ours)
    configs = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*/transformer/config.json"))]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_a_run_that_trains_all_weights_is_the_same_sharded_and_resumes(
    launch: Launch, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Three iterations in two processes, in one, and in two that stop after two, of which either goes on."""
    settings = (
        "tests/data/tiny.yaml", f"policy.path={tiny_pipeline}", "policy.trainable=full", "policy.reference_copy=true",
        "run.ema_decay=0.5", "rollout.groups=3", "evaluation.count=3", "evaluation.batch_size=1", "rollout.micro_batch=1",
        "trainer.optimizer.eps=1e-5",  # or a gradient that is rounding alone takes a whole step of Adam's
    )  # fmt: skip

    def run(weights: str, name: str, *changes: str, count: int = 2) -> dict[str, dict[str, torch.Tensor]]:
        output = tmp_path / name
        launch("tests.helpers.sharded_run", weights, *settings, f"run.output={output}", *changes, count=count)
        step = output / "tiny" / "checkpoints" / ("step-2" if changes else "step-3")
        files = {file.stem: load_file(file) for file in step.glob("*.safetensors")}
        return files | {"networks": load_file(next((output / "tiny" / "networks").rglob("*.safetensors")))}

    sharded, one = run("fsdp2", "two"), run("replicated", "one", count=1)
    run("fsdp2", "stopped", "run.iterations=2")
    copytree(tmp_path / "stopped", tmp_path / "stopped too")
    assert sharded.keys() == one.keys() == {"role_policy", "optimizer_policy", "ema", "networks"}
    for part, found in run("fsdp2", "stopped").items():
        assert all(torch.equal(found[name], tensor) for name, tensor in sharded[part].items())
    for others in (one, run("replicated", "stopped too", count=1)):
        for part, found in others.items():
            ours, theirs = (torch.cat([each[name].flatten() for name in found]) for each in (sharded[part], found))
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_adapters_beside_trained_weights_are_refused() -> None:
    network = torch.nn.ModuleDict(
        {"base": torch.nn.Linear(2, 2), "a": torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2)})}
    )
    policy = SimpleNamespace(networks=lambda: [network])
    with pytest.raises(ConfigError, match=r"expected networks that are frozen but for their adapters, or without any"):
        shard(policy, Processes())  # type: ignore[arg-type]


def test_a_network_that_will_be_sharded_is_loaded_on_another_device(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none", network_device="meta")
    assert {p.device.type for p in policy.modules()["transformer"].parameters()} == {"meta"}
    latents = torch.zeros(1, *policy.latent_shape(Size(24, 48)))
    assert (
        policy.decode(latents).device.type == policy.encode(as_records(["KITE"])).tensors["embeds"].device.type == "cpu"
    )
