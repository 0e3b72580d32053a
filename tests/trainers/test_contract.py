"""The trainer contract in full: a fake trainer through the real loop, stopped and taken up, alone and in two processes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowalign.config import load_config
from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Summed
from flowalign.loop import train
from flowalign.objectives import scalar_adjoint
from flowalign.run.checkpoints import Progress
from flowalign.run.iteration_log import IterationLog
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import Update
from tests.helpers.forks import Forks

CONFIG = str(Path(__file__).parents[1] / "data" / "contract.yaml")
TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


def run_it(pipeline: Path, output: Path, *overrides: str):
    config, plain = load_config(CONFIG, [f"policy.path={pipeline}", f"run.output={output}", *overrides])
    train(config, plain)
    return config.trainer


def saved(output: Path, name: str = "contract") -> tuple[dict[str, torch.Tensor], dict, list]:
    tensors, state = checkpoint.load(checkpoint.latest(output / name))
    flat = {f"{section}/{key}": value for section, part in tensors.items() for key, value in part.items()}
    rows = [without_time(row) for row in read_rows(output / name / "metrics.jsonl")]
    return flat, {key: value for key, value in state.items() if not key.startswith("time/")}, rows


@pytest.fixture(scope="module")
def uninterrupted(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("contract")
    assert run_it(tiny_pipeline, output).calibrations == 1
    return output


def test_every_role_goes_its_own_way(uninterrupted: Path) -> None:
    """Six policy steps: old copied the sixth, sampling and fast_ema lag, fake has gone where its own optimizer led."""
    tensors, state, rows = saved(uninterrupted)
    assert state["updates"] == 6
    weights = {
        role: torch.cat([v.flatten() for k, v in tensors.items() if k.startswith(f"role_{role}/")])
        for role in ("policy", "old", "fast_ema", "sampling", "fake")
    }
    assert torch.equal(weights["old"], weights["policy"])
    distance = {role: float((value - weights["policy"]).norm()) for role, value in weights.items()}
    assert distance["fast_ema"] > 0 and distance["sampling"] > 0 and distance["fake"] > 0
    assert all("optim/grad_norm" in row and "optim/fake_grad_norm" in row for row in rows)


def test_what_the_calibration_cost_is_counted_once(uninterrupted: Path) -> None:
    """It rolls out two prompts, as many as an iteration, with a window of its own."""
    _, state, rows = saved(uninterrupted)
    images, prepared = rows[0]["cost/images"], rows[0]["cost/prepare_evaluations"]
    assert images < prepared < 4 * images
    assert rows[0]["cost/prepare_decodes"] == rows[0]["cost/prepare_reward_calls"] == images
    assert not any("cost/prepare_evaluations" in row for row in rows[1:])
    assert state["totals"]["rollout"] == prepared + sum(images * row["cost/rollout_per_image"] for row in rows)


def test_a_role_of_the_trainer_is_saved_as_one_of_the_configuration(uninterrupted: Path, tiny_pipeline: Path) -> None:
    """contract.yaml does not name "fake", which the trainer asks for and trains."""
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}"])
    tensors, _, _ = saved(uninterrupted)
    assert "fake" not in config.policy.roles
    assert {name.split("/")[0] for name in tensors if name.startswith("role_")} == {
        f"role_{name}" for name in ("policy", *config.roles)
    }


def test_a_loss_that_reaches_other_weights_leaves_no_gradient_there() -> None:
    """Else the next step of those weights, here the policy's, would take it for its own."""
    policy, fake = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([weights], lr=0.1) for weights in (policy, fake)]
    steppers = {optimizer: Summed(optimizer, Processes()) for optimizer in optimizers}
    run = SimpleNamespace(steppers=steppers, losses=[], log=IterationLog(None, None, None, False, Progress()))
    (policy * fake).sum().backward()
    Run.step(run, Update(optimizers[1], 1.0, [lambda: torch.zeros(())], dict, "fake"))
    assert float(fake.detach()) == pytest.approx(0.9)
    assert policy.grad is None and float(policy.detach()) == 1


def test_a_stopped_run_is_taken_up_without_a_second_calibration(
    uninterrupted: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = Run.step, []

    def dies(self: Run, update) -> None:
        steps.append(1)
        if len(steps) == 7:  # inside the second iteration, between the two optimizers
            raise KeyError("killed")
        original(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyError):
            run_it(tiny_pipeline, tmp_path)
    assert run_it(tiny_pipeline, tmp_path).calibrations == 0
    (tensors, state, rows), (expected, expected_state, expected_rows) = saved(tmp_path), saved(uninterrupted)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (state, rows) == (expected_state, expected_rows)


def test_the_adjoint_gives_the_gradient_of_the_whole_group() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, target = torch.randn(7, 3).double(), torch.randn(7).double()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return ((values[:, None] - values[None]) - (target[:, None] - target[None])).square().mean()

    loss(network(x)[:, 0]).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with torch.no_grad():
        values = network(x)[:, 0]
    total, adjoint = scalar_adjoint(values, loss)
    for rows in torch.arange(7).split(2):
        (adjoint[rows] * network(x[rows])[:, 0]).sum().backward()
    assert total == pytest.approx(float(loss(values)))
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=1e-14)


def test_a_run_in_two_processes_ends_where_one_does(tiny_pipeline: Path, tmp_path: Path, forks: Forks) -> None:
    """Two iterations; then taken up for a third. (`accelerate launch --cpu --num_processes 2` would give one process.)"""
    settings = [f"policy.path={tiny_pipeline}", "rollout.groups=3"]

    def launch(output: Path, iterations: int) -> None:
        words = ["scripts/train.py", TINY, *settings, f"run.output={output}", f"run.iterations={iterations}"]
        printed = forks.check(*words, count=2, environment={"ACCELERATE_USE_CPU": "true"})
        assert printed.count("held-out jpeg_compressibility") == 1  # one process speaks

    train(*load_config(TINY, [*settings, f"run.output={tmp_path / 'one'}", "run.iterations=3"]))
    launch(tmp_path / "two", 2)
    launch(tmp_path / "two", 3)
    (one, _, one_rows), (two, _, two_rows) = saved(tmp_path / "one", "tiny"), saved(tmp_path / "two", "tiny")
    for name, value in one.items():
        if name.startswith("role_policy/"):
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)
    assert [row["step"] for row in two_rows] == [1, 2, 3]
    for a, b in zip(one_rows, two_rows, strict=True):
        assert a["reward/mean"] == pytest.approx(b["reward/mean"], rel=1e-4)
    tuned = [json.loads((tmp_path / n / "tiny" / "summary.json").read_text())["tuned"] for n in ("one", "two")]
    assert tuned[0] == pytest.approx(tuned[1], rel=1e-3)
