"""Plans in YAML, nested and wrapped, come out as the objects that Python would build."""

from pathlib import Path

import pytest
import yaml

from flowalign.config import load_config
from flowalign.errors import ConfigError
from samplers import (
    Branch,
    Chain,
    Compressed,
    Plan,
    Probed,
    RandomSteps,
    Selected,
    Sliding,
    Sourced,
    SplitTree,
    TreeWindow,
    Window,
)

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"


def part(name: str, **init: object) -> object:
    return {"class_path": f"samplers.{name}", "init_args": init} if init else f"samplers.{name}"


def plan_of(folder: Path, plan: object) -> Plan:
    config = yaml.safe_load(TINY.read_text())
    sources = {"teacher": "reference"} if "Sourced" in str(plan) else {}
    config["rollout"] |= {"plan": plan, "num_inference_steps": 4, "group_size": 4, "sources": sources}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(str(path), [])[0].rollout.plan


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (part("Branch", branches=2, count=1, candidates=[0, 2]), Branch(2, 1, (0, 2))),
        (part("SplitTree", splits=[0, 1], train_last=False), SplitTree((0, 1), train_last=False)),
        (part("SplitTree", splits=[0], factor=4, window=1, position=part("Sliding", every=3)),
         SplitTree((0,), 4, window=1, position=Sliding(3))),
        (part("TreeWindow", depth=2, growth=0.0), TreeWindow(2, growth=0.0)),
        (part("RandomSteps", count=2, candidates=[0, 1, 2]), RandomSteps(2, (0, 1, 2))),
        (part("Probed", plan=part("Chain"), steps=2, at=[1, 2]), Probed(Chain(), 2, at=(1, 2))),
        (part("Probed", plan=part("Compressed", plan=part("Window", size=1), ratio=0.5)),
         Probed(Compressed(Window(1), 0.5))),
        (part("Sourced", plan=part("Chain"), teacher=1), Sourced(Chain(), teacher=1)),
        (part("Selected", plan=part("Chain"), counts={1: 4}, within="root"), Selected(Chain(), {1: 4}, "root")),
    ],
)  # fmt: skip
def test_plans_are_named_in_yaml(tmp_path: Path, plan: object, expected: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowalign.trainers.policy_gradient.dry_run", lambda *parts: None)  # Broadcast reads no probes
    built = plan_of(tmp_path, plan)
    assert built == expected and built.forecast(4, 4) == expected.forecast(4, 4)


def test_a_selection_is_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        plan_of(tmp_path, part("Probed", plan=part("Selected", plan=part("Chain"), counts={1: 2})))
