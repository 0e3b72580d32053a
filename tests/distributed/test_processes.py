"""Two processes do what one does: the same noise, the same batch, the same gradient, and no process waits for ever."""

import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flowalign.distributed.processes import Processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_shares_and_deals_cover_everything_once(count: int, n: int) -> None:
    everyone = [Processes(rank, count) for rank in range(count)]
    assert [i for each in everyone for i in each.share(n)] == list(range(n))
    dealt = [each.deal(n).tolist() for each in everyone]
    assert sorted(i for rows in dealt for i in rows if i >= 0) == list(range(n))
    assert {len(rows) for rows in dealt} == {-(-n // count)}  # every process runs as many


def launch(
    count: int, pipeline: Path, output: Path, plan: str, weights: str = "replicated"
) -> list[tuple[dict[str, torch.Tensor], dict[str, str]]]:
    output.mkdir()
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(output)}
    subprocess.run(
        [sys.executable, *runner, "-m", "tests.helpers.one_iteration", str(pipeline), str(output), plan, weights],
        cwd=Path(__file__).parents[2], env=environment, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    results = []
    for rank in range(count):
        with safe_open(str(output / f"{rank}.safetensors"), framework="pt") as file:
            results.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata()))  # noqa: SIM118
    return results


@pytest.mark.parametrize(
    ("plan", "states", "padded", "weights"),
    [  # nine states: one process runs one more, with weight 0
        ("window", 9, 10, "replicated"),
        ("selected", 24, 24, "replicated"),
        ("window", 9, 10, "sharded"),
        pytest.param("window", 9, 10, "checkpointed", marks=pytest.mark.slow),  # and sharded
    ],
)
def test_two_processes_equal_one(
    tiny_pipeline: Path, tmp_path: Path, plan: str, states: int, padded: int, weights: str
) -> None:
    """Unequal trees, a process whose groups teach nothing, best of n, a masked reward, a prompt that comes twice."""
    [(one, metrics)] = launch(1, tiny_pipeline, tmp_path / "one", plan)
    (first, first_metrics), (second, second_metrics) = launch(2, tiny_pipeline, tmp_path / "two", plan, weights)
    assert first["rows"][0] != second["rows"][0]  # the trees are unequal …
    assert first["rows"][0] + second["rows"][0] == one["rows"][0]  # … and each state is evaluated by one process
    assert first["rows"][1] == second["rows"][1]
    assert not one["valid"].all() and one["valid"].sum() > 0 and one["state_scores"].isfinite().sum() > 10
    assert first_metrics == second_metrics
    assert first_metrics.keys() == metrics.keys()
    for name in ("group/trained_edges", "group/zero_std_ratio", "reward/invalid", "cost/rollout_per_image"):
        assert first_metrics[name] == metrics[name]
    assert literal_eval(metrics["cost/trained_per_image"]) == states / 20
    assert literal_eval(first_metrics["cost/trained_per_image"]) == padded / 20
    for name in metrics.keys() - {"cost/trained_per_image", "ratio/drift_max"}:
        assert literal_eval(first_metrics[name]) == pytest.approx(literal_eval(metrics[name]), rel=1e-4, abs=1e-7)
    trained = [name for name in one if "lora" in name]
    assert trained
    for own in (first, second):
        torch.testing.assert_close(own["roots"], one["roots"], rtol=0, atol=0)
        for name in ("leaves", "scores", "state_scores", "uncertainty"):
            torch.testing.assert_close(own[name], one[name], rtol=0, atol=1e-5, equal_nan=True)
        for name in trained:
            assert (own[name] - one[name]).norm() <= 1e-5 * one[name].norm()
            assert one[name].norm() > 0
    for name in first:
        if name != "rows":
            torch.testing.assert_close(
                first[name], second[name], rtol=0, atol=0, equal_nan=True
            )  # one batch, one gradient
