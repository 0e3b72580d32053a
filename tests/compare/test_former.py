"""A comparison whose baseline another one has run. Runs train in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign.compare import command
from flowalign.errors import ConfigError
from flowalign.report import summary
from tests.helpers.comparison import InProcess
from tests.helpers.tiny_run import CONFIG

HALF = "{class_path: rewards.JPEGCompressibility, init_args: {divide_by: 2.0, name: half}}"
OTHER = "evaluation.rewards=[{class_path: rewards.JPEGCompressibility, init_args: {divide_by: 2.0}}]"


def compare(folder: Path, name: str, spec: dict[str, Any], *options: str) -> dict[str, Any]:
    """Runs it and returns its results."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    command.compare([str(folder / f"{name}.yaml"), *options])
    return json.loads((folder / "results" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def setting(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory):
    """(a folder with the results of `first`: its method plain; what a second comparison says beside its baseline)."""
    folder = tmp_path_factory.mktemp("former")
    shared = {
        "overrides": [f"policy.path={tiny_pipeline}", "run.iterations=50", "evaluation.every=1"], "seeds": [1],
        "output": str(folder / "runs"), "results": str(folder / "results"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Launcher", InProcess)
        patch.setattr(summary, "write_report", lambda folder: folder)
        compare(folder, "first", shared | {"budget": {"evaluations": 130}, "methods": {"plain": {"files": [CONFIG]}}})
        former = {"results": str(folder / "results" / "first.json"), "method": "plain"}
        judges = f"evaluation.rewards=[rewards.JPEGCompressibility, {HALF}]"
        methods = {"small": {"files": [CONFIG], "overrides": ["rollout.groups=1", judges]}}
        yield folder, shared | {"baseline": former, "share": 0.5, "methods": methods}


@pytest.fixture(scope="module")
def second(setting) -> dict[str, Any]:
    """The results of the second comparison; evaluated by a second reward, too."""
    folder, spec = setting
    return compare(folder, "second", spec)


def test_a_baseline_of_other_results_is_the_target_and_is_not_run_again(setting, second: dict[str, Any]) -> None:
    folder, _ = setting
    first = json.loads((folder / "results" / "first.json").read_text())
    plain, small = first["methods"]["plain"], second["methods"]["small"]
    assert list(second["methods"]) == ["small"] and second["baseline"] == "plain"
    assert second["denominator_evaluations"] == plain["evaluations"]
    assert 0 < small["evaluations"] <= 0.5 * plain["evaluations"] and small["base"] == plain["base"]
    assert second["target"] in (None, plain["tuned"]) and (second["target"] is None) == (plain["gain"] <= 0)
    assert first.keys() | {"baseline_results"} == second.keys() and plain.keys() == small.keys()
    assert not list((folder / "runs" / "second").glob("plain*"))
    table, page = ((folder / "results" / f"second.{ending}").read_text() for ending in ("md", "html"))
    assert "| plain | 1 |" in table and "| small | 1 |" in table
    assert (
        page.count("data:image/svg+xml") == 4 + 1 and "Beside the reward" in page
    )  # of the baseline no plot of its own


def test_what_else_is_measured_stands_beside_the_reward(setting, second: dict[str, Any]) -> None:
    small, others = second["methods"]["small"], second["methods"]["small"]["others"]
    assert list(others) == ["image/contrast", "image/saturation", "prompts/distance", "half"]
    for change in others.values():
        assert change["gain"] == pytest.approx(change["tuned"] - change["base"], abs=2e-5)
        assert change["gain_ci95"][0] <= change["gain"] <= change["gain_ci95"][1]
    for key in ("base", "tuned", "gain"):  # half the reward
        assert others["half"][key] == pytest.approx(small[key] / 2, abs=2e-5)
    table = (setting[0] / "results" / "second.md").read_text().partition("Beside the reward")[2]
    plain, ours = (line.split(" | ") for line in table.splitlines() if line.startswith(("| plain", "| small")))
    assert plain[-1] == "– |" and plain[1] != "–" and ours[-1].startswith(f"{others['half']['tuned']:.3f} (")


def test_a_record_without_looks_is_read_as_before(setting, second: dict[str, Any]) -> None:
    folder, spec = setting
    [path] = (folder / "results" / "second").glob("small-*.json")
    text = path.read_text()
    content = json.loads(text)
    for evaluation in ("base", "tuned"):
        content[evaluation] = {content["reward"]: content[evaluation][content["reward"]]}
    try:
        path.write_text(json.dumps(content))
        found = compare(folder, "second", spec, "--only-report")
    finally:
        path.write_text(text)
    small = found["methods"]["small"]
    assert small["others"] == {} and small["gain"] == second["methods"]["small"]["gain"]
    assert "| small | – | – | – |" in (folder / "results" / "second.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overrides": ["evaluation.seed=5"]}, "is evaluated differently: seed is 5 here and 1234 there"),
        ({"overrides": ["evaluation.count=3"]}, "is evaluated differently: count is 3 here and 4 there"),
        ({"overrides": [OTHER]}, r"rewards\.0\..*divide_by is 2\.0 here and 1\.0 there"),
        ({"baseline": {"results": "nowhere.json", "method": "plain"}}, "baseline.results='nowhere.json'; expected the"),
        ({"baseline": {"method": "plane"}}, "baseline.method='plane'; expected one of plain, the methods of"),
    ],
)
def test_a_baseline_that_was_evaluated_otherwise_is_refused(setting, change: dict[str, Any], message: str) -> None:
    folder, spec = setting
    changed = dict(spec)
    small = spec["methods"]["small"]
    changed["methods"] = {"small": small | {"overrides": [*small["overrides"], *change.get("overrides", [])]}}
    changed["baseline"] = spec["baseline"] | change.get("baseline", {})
    with pytest.raises(ConfigError, match=message):
        compare(folder, "refused", changed)
    assert not (folder / "runs" / "refused").exists()


def test_records_that_are_lost_or_of_another_base_are_refused(setting, second: dict[str, Any]) -> None:
    folder, spec = setting
    [path] = (folder / "results" / "first").glob("plain-*.json")
    text = path.read_text()
    content = json.loads(text)
    try:
        path.write_text(json.dumps(content | {"totals": content["totals"] | {"evaluations": 7}}))
        with pytest.raises(
            ConfigError, match=r"lacks the records of plain, seeds \[1\], of which .*first\.json is made"
        ):
            compare(folder, "second", spec, "--only-report")
        base = {name: scores[::-1] for name, scores in content["base"].items()}
        path.write_text(json.dumps(content | {"base": base}))
        with pytest.raises(ConfigError, match="expected the same base, noise and reward: run the baseline again"):
            compare(folder, "second", spec, "--only-report")
    finally:
        path.write_text(text)
