"""The benchmark: counts are exact, variants train the same thing, the files hold what they say."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from flowalign import cli
from flowalign.build import policy_of, task_of
from flowalign.config import load_config
from flowalign.diagnostics import benchmark
from flowalign.diagnostics.benchmark import bare_network, compare, table
from flowalign.diagnostics.device import elapsed, mark, peak, reset_peak, waits
from flowalign.diagnostics.doctor import distinct_prompts
from flowalign.diagnostics.measure import distance, gradients, one_pass_per_edge
from flowalign.errors import ConfigError
from tests.helpers.treeless_trainer import Treeless

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
AT_STEP_1 = ["rollout.plan.init_args.low=1", "rollout.plan.init_args.high=2"]  # one step of prefix, T = 3, 3 images


def counts(pipeline: Path, *overrides: str) -> dict[str, dict[str, float]]:
    config, _ = load_config(CONFIG, [f"policy.path={pipeline}", *AT_STEP_1, *overrides])
    return {row["variant"]: row["evaluations"] for row in compare(config, benchmark.VARIANTS, 1)}


@pytest.mark.parametrize(
    ("overrides", "guided", "backward", "reference"),
    [
        ([], 1, 2, 1),
        (["trainer.regularizers.kl.beta=0"], 1, 2, 0),
        (["rollout.guidance_scale=3.0", "rollout.allow_cfg_update=true"], 2, 2, 1),
        (["policy.trainable=full", "trainer.regularizers.kl.beta=0"], 1, 3, 0),
        (["policy.trainable=full", "policy.reference_copy=true"], 1, 3, 1),
    ],
    ids=["reference", "no-reference", "guided", "full", "full-reference"],
)
def test_counts_are_exact(
    tiny_pipeline: Path, overrides: list[str], guided: int, backward: int, reference: int
) -> None:
    """A group of 3, window of one step at step 1 of 3: 1 shared step, 1 shared state before the window, 3 after it."""
    found = counts(tiny_pipeline, *overrides)
    expected = {"merged": (5 / 3, 1 / 3), "per-edge": (5 / 3, 1.0), "unshared": (3.0, 1.0)}
    for name, (rollout, trained) in expected.items():
        assert found[name]["rollout"] == pytest.approx(guided * rollout)
        assert found[name]["trained"] == pytest.approx(guided * trained)
        assert found[name]["reference"] == pytest.approx(guided * trained * reference)
        assert found[name]["update"] == pytest.approx(guided * trained * (backward + reference))
        assert found[name]["total"] == pytest.approx(found[name]["rollout"] + found[name]["update"])


def test_the_files_and_the_table(tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [CONFIG, f"policy.path={tiny_pipeline}", *AT_STEP_1, "--iterations", "2", "--output", str(tmp_path)]
    assert cli.benchmark(arguments) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"config", "overrides", "iterations", "unit", "device", "torch", "rows"} == result.keys()
    merged, edges, alone = result["rows"]
    assert [row["variant"] for row in result["rows"]] == list(benchmark.VARIANTS)
    for row in result["rows"]:
        assert row["images"] == 2 * 2 * 3 and min(row["peak_mib"].values()) > 100
        assert row["images_per_second"] == pytest.approx(6 / row["seconds"]["wall"], rel=0.5)
        assert row["over_network"] > 1 and row["tflops"] > 0 and row["waits"] == {"rollout": 0, "update": 0}
        assert row["seconds"].keys() == {"rollout", "decode", "reward", "update", "wall"}
        assert row["bare"].keys() == {"forward", "backward", "decode", "reward"}
        assert row["overhead"] > 1 and min(row["seconds"].values()) > 0 and min(row["bare"].values()) > 0
        assert row["seconds"]["wall"] > row["seconds"]["rollout"] + row["seconds"]["update"]
    assert set(merged["ratio"].values()) == {1.0}
    assert edges["ratio"]["update_evaluations"] == pytest.approx(3)
    assert edges["ratio"]["evaluations"] == pytest.approx((5 / 3 + 3) / (5 / 3 + 1))
    assert alone["ratio"]["evaluations"] == pytest.approx(6 / (5 / 3 + 1))
    assert (tmp_path / "benchmark.md").read_text() == table(result["rows"]) + "\n"
    assert table(result["rows"]) in capsys.readouterr().out
    assert "| merged | 1.67 + 1.00 = 2.67 |" in table(result["rows"])


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["plain", "guided"])
def test_operations_of_the_bare_network_are_those_of_its_layers(tiny_pipeline: Path, scale: float) -> None:
    """Without the adapters: twice inputs × outputs × tokens of every linear layer, and more (attention, convolution). A guided
    state has two rows, each of which costs the same. What it counts is not counted as the run's."""
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}", f"rollout.guidance_scale={scale}", "rollout.allow_cfg_update=true"])  # fmt: skip
    policy = policy_of(config, "cpu")
    task, seen = task_of(config, policy), []
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: seen.append(2 * args[0].numel() * layer.out_features))
        for name, layer in policy.networks()[0].named_modules()
        if isinstance(layer, torch.nn.Linear) and ".lora_" not in name
    ]
    before = policy.evaluations
    with policy.role("reference"):
        conditions = policy.encode(task.prompts[:1])
        policy.velocity(torch.zeros(1, *policy.latent_shape(task.size)), torch.full((1,), 0.5), conditions)
    layers, policy.evaluations = sum(seen), before
    for hook in hooks:
        hook.remove()
    seconds, operations = bare_network(task, task.prompts, repeats=1)
    assert seconds > 0 and policy.evaluations == before
    assert layers < operations < 1.5 * layers


def test_on_a_gpu_a_mark_waits_for_nothing_and_time_is_read_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, later: "Event") -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    began, ended = mark(), mark()
    assert done == ["record", "record"]
    assert elapsed(began, ended) == 0.25 and done == ["record", "record", "synchronize"]


def test_where_the_host_waits_for_a_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int | str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another one", stacklevel=1)
    assert len(found) == 1 and found[0].startswith(__file__) and modes == ["warn", 0]


@pytest.mark.parametrize("plan", ["samplers.Chain", "samplers.Window"])
def test_one_pass_per_edge_gives_the_merged_gradient(tiny_pipeline: Path, plan: str) -> None:
    arguments = "{size: 2}" if plan.endswith("Window") else "{shared_start: true, train_last: false}"
    overrides = [f"policy.path={tiny_pipeline}", f"rollout.plan={plan}", f"rollout.plan.init_args={arguments}"]
    config, _ = load_config(CONFIG, overrides)
    policy = policy_of(config, "cpu")
    for _, parameter in policy.trainable_parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    task, trainer = task_of(config, policy, groups=2), config.trainer
    trainer.prepare(task, None)
    batch = trainer.collect(distinct_prompts(config, 2), 0)
    parts = one_pass_per_edge(trainer, task, batch)
    assert len(parts) == 3 and sum(share for _, share in parts) == pytest.approx(1)
    whole, single = gradients(policy, trainer, batch), {}
    for part, share in parts:
        for name, grad in gradients(policy, part, batch).items():
            single[name] = single.get(name, 0) + share * grad
    assert distance(single, whole) < 1e-5
    assert distance({name: 0.5 * grad for name, grad in whole.items()}, whole) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "part", [["trainer.objective=flowalign.objectives.KLMask", "trainer.anchor=stored"],
             ["rollout.plan=samplers.Selected", "rollout.plan.plan=samplers.Chain", "rollout.plan.counts={1: 2}"]],
    ids=["velocities", "selection"],
)  # fmt: skip
def test_what_has_no_form_without_sharing_is_refused(tiny_pipeline: Path, part: list[str]) -> None:
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}", *part])
    assert [row["variant"] for row in compare(config, ["merged", "per-edge"], 1)] == ["merged", "per-edge"]
    with pytest.raises(ConfigError, match="leave out the variant 'unshared'"):
        compare(config, ["unshared"], 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--variants", "merged,serial"], "serial"), (["--iterations", "0"], "iterations=0"), (["rollout.groups=0"], "groups")],
)  # fmt: skip
def test_bad_arguments_are_named(
    tiny_pipeline: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.benchmark([CONFIG, f"policy.path={tiny_pipeline}", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_benchmark_that_trains_nothing_is_said(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = ["reward=rewards.FunctionReward", "reward.path=tests.diagnostics.test_benchmark:flat"]
    overrides = [f"policy.path={tiny_pipeline}", *flat, "trainer.signal.select=flowalign.selectors.NonZeroAdvantage"]
    assert cli.benchmark([CONFIG, "--iterations", "1", *overrides]) == 2
    assert "AllEdges" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(benchmark, "compare", lambda *arguments: pytest.fail("it was measured"))
    assert cli.benchmark([CONFIG, "--output", str(tmp_path / "file")]) == 2
    assert "--output" in capsys.readouterr().err


def flat(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.zeros(len(images))


def test_another_trainer_is_refused(tiny_pipeline: Path) -> None:
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}"])
    object.__setattr__(config, "trainer", Treeless())
    with pytest.raises(ConfigError, match="got trainer Treeless; expected one whose loss is a sum over the steps"):
        compare(config, ["merged"], 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets its peak on Linux only")
def test_the_peak_is_of_what_came_since_the_reset() -> None:
    reset_peak()
    before = peak()
    block = torch.ones(20_000_000)  # 76 MiB
    assert peak() > before + 70
    del block
    reset_peak()
    assert peak() < before + 30
