"""What a comparison may say, and the sentence for what it may not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign.compare.spec import Budget, of_files, read_spec
from flowalign.errors import ConfigError

GOOD: dict[str, Any] = {
    "methods": {"a": {"files": ["a.yaml"]}, "b": {"files": ["b.yaml"], "overrides": ["x.y=2"], "guided": True}},
    "files": ["model.yaml"], "overrides": ["x.y=1"], "seeds": [1, 2], "budget": {"evaluations": 100}, "baseline": "a", "share": 0.2,
}  # fmt: skip


def read(tmp_path: Path, spec: dict[str, Any]) -> Any:
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return read_spec(str(tmp_path / "try.yaml"))


def test_shared_files_lie_over_a_methods_own_and_its_own_overrides_over_shared_ones(tmp_path: Path) -> None:
    comparison = read(tmp_path, GOOD)
    assert (comparison.name, comparison.baseline, comparison.share) == ("try", "a", 0.2)
    assert comparison.methods["b"].files == ("b.yaml", "model.yaml")
    assert comparison.methods["b"].overrides == ("x.y=1", "x.y=2") and comparison.methods["b"].seeds == (1, 2)
    assert comparison.methods["b"].apart and not comparison.methods["a"].apart  # guided is apart
    assert comparison.budget.override == "run.max_evaluations=100"
    assert Budget("seconds", 1.5).override == "run.max_seconds=1.5"
    assert comparison.output == Path("runs/compare/try")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, r"try\.yaml: the comparison has no key 'sedes': did you mean 'seeds'\?"),
        ({"methods": {}}, r"methods=\{\}; expected name: \{files"),
        ({"methods": {"a": {"files": ["a.yaml"], "override": []}}}, r"methods\.a has no key 'override'.*'overrides'"),
        ({"methods": {"a": {}}}, "methods.a lacks 'files'"),
        ({"methods": {"a/b": {"files": ["a.yaml"]}}}, "the method 'a/b'; expected letters"),
        ({"methods": {"a": {"files": "a.yaml"}}}, r"methods\.a\.files='a\.yaml'; expected a list"),
        ({"methods": {"a": {"files": ["a.yaml"], "apart": "no way"}}}, r"methods\.a\.apart='no way'; expected true"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]; expected a list of different whole numbers"),
        ({"seeds": [True]}, r"seeds=\[True\]"),
        ({"baseline": "c"}, "baseline='c'; expected one of the methods a, b"),
        ({"share": 0}, "share=0; expected a number above 0"),
        ({"baseline": {"results": "a.json"}}, "baseline lacks 'method'; expected results, method"),
        ({"baseline": {"results": "a.json", "name": "c"}}, "baseline has no key 'name'"),
        ({"baseline": {"results": 5, "method": "c"}}, "baseline.results=5; expected a text"),
        ({"baseline": {"results": "a.json", "method": "a"}}, "baseline.method=a, which is one of the methods too"),
        ({"baseline": {"results": "a.json", "method": "c"}}, "a budget beside a baseline of other results"),
        ({"baseline": ["a"]}, r"baseline=\['a'\]; expected one of the methods a, b"),
        ({"budget": {"evaluations": 10**400}}, r"budget\.evaluations=10+; expected a whole number"),
        ({"results": 5}, "results=5; expected a folder, or leave the key out for results"),
        ({"output": ""}, "output=''; expected a folder"),
        ({"baseline": None}, "share=0.2; expected .* of a `baseline`"),
        ({"budget": None}, "no budget for a; expected budget"),
        ({"budget": None, "baseline": None, "share": None}, "no budget for a, b; expected budget"),
        ({"budget": {"evaluations": 1.5}}, r"budget\.evaluations=1\.5; expected a whole number above 0"),
        ({"budget": {"seconds": 0}}, r"budget\.seconds=0; expected a number above 0"),
        ({"budget": {"seconds": 1, "evaluations": 1}}, "expected {evaluations: N} or {seconds: N}"),
        ({"overrides": ["run.seed=3"]}, r"override 'run\.seed=3' in overrides; expected key=value, and not of what"),
        ({"overrides": ["rollout"]}, "override 'rollout'"),
        ({"references": {"base": "high"}}, "references=.*expected name: score"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {key: value for key, value in (GOOD | change).items() if value is not None})


def test_a_baseline_of_other_results_has_no_budget_here(tmp_path: Path) -> None:
    given = {key: value for key, value in GOOD.items() if key != "budget"}
    comparison = read(tmp_path, given | {"baseline": {"results": "r/a.json", "method": "c"}})
    assert (comparison.baseline, comparison.former, comparison.share) == ("c", Path("r/a.json"), 0.2)
    assert read(tmp_path, GOOD).former is None


def test_a_key_without_a_value(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD | {"share": None}).share == 1
    with pytest.raises(ConfigError, match="results=None; expected a folder"):
        read(tmp_path, GOOD | {"results": None})


def test_files_alone_are_a_comparison() -> None:
    comparison = of_files(["m/a.yaml", "m/b.yaml"], ["model.yaml"], ["x=1"], [3], {"seconds": 5}, "b", "the command")
    assert list(comparison.methods) == ["a", "b"] and comparison.methods["a"].files == ("m/a.yaml", "model.yaml")
    assert comparison.budget == Budget("seconds", 5.0) and comparison.baseline == "b" and comparison.name == "a-b"
    with pytest.raises(ConfigError, match="expected files of different names"):
        of_files(["m/a.yaml", "n/a.yaml"], [], [], [1], {"seconds": 5}, None, "")
    with pytest.raises(ConfigError, match="no budget for a"):
        of_files(["m/a.yaml"], [], [], [1], {}, None, "")
