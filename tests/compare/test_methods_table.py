"""One table of several comparisons, from made-up results."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from flowalign.errors import ConfigError

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "methods_table.py"))


def method(gain: float, reached: int | None, **others: Any) -> dict[str, Any]:
    to_target = {f"{cost}_to_target": reached for cost in ("evaluations", "decodes", "reward_calls", "seconds")}
    return {
        "gain": gain, "gain_ci95": [gain - 0.1, gain + 0.1], "seeds": [1, 2], **to_target,
        "curve": {"evaluations": [0, 1000], "score": [0.3, 0.3 + gain]}, **others,
    }  # fmt: skip


def results(methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "command": "flowalign compare a.yaml", "reward": "ocr", "prompts": 8, "baseline": "old", "target": 0.4,
        "denominator_evaluations": 5000, "methods": methods, **changes,
    }  # fmt: skip


ONE = results({"old": method(0.1, 5000), "slow": method(0.05, None), "fast": method(0.2, 700)})
TWO = results({"none": method(-0.05, None), "faster": method(0.15, 1600, apart=True), "better": method(0.09, None)})


def write(folder: Path, **found: dict[str, Any]) -> list[str]:
    for name, content in found.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    paths = [str(folder / f"{name}.json") for name in found]
    return [*paths, "--output", str(folder / "all_methods")]


def test_methods_stand_by_evaluations_to_the_target_then_by_gain(tmp_path: Path) -> None:
    SCRIPT["main"](write(tmp_path, one=ONE, two=TWO))
    text = (tmp_path / "all_methods.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    names = [line[0].removeprefix("| ") for line in lines]
    assert names == ["fast", "faster (apart)", "old", "better", "slow", "none"]
    assert lines[1][2:6] == ["1,600"] * 4 and lines[3][2:6] == ["–"] * 4
    assert lines[0][1] == "2" and lines[0][6:] == ["+0.200", "+0.100 to +0.300 |"] and lines[5][6] == "−0.050"
    drawn = (tmp_path / "all_methods.svg").read_text()
    assert drawn.count('id="line2d') > 6 and "(all_methods.svg)" in text
    SCRIPT["main"](write(tmp_path, one=ONE, two=TWO))
    assert (tmp_path / "all_methods.svg").read_text() == drawn


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (TWO | {"target": 0.5}, r"one\.json and .*two\.json differ in target: 0\.4 and 0\.5; expected the same"),
        (TWO | {"reward": "clip"}, "differ in reward"),
        (results({"fast": method(0.1, None)}), "got fast in several comparisons"),
        (
            results({"plain": {"gain": 0.1}}),
            "has no curves: write it again with `flowalign compare a.yaml --only-report`",
        ),
    ],
)
def test_results_that_do_not_belong_together_are_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        SCRIPT["main"](write(tmp_path, one=ONE, two=other))
    assert not (tmp_path / "all_methods.md").exists()
