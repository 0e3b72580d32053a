"""Every part can be named in YAML, nested ones too, and comes out as the object that Python would build."""

from pathlib import Path

import pytest
import yaml

from flowalign import advantage, credit, objectives, selectors
from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.trainers import GainBalance

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are built one at a time here; whether they fit each other is tests/trainers/test_dry_run.py."""
    monkeypatch.setattr("flowalign.trainers.policy_gradient.dry_run", lambda *parts: None)


def part(name: str, **init) -> dict:
    return {"class_path": f"flowalign.{name}", "init_args": init} if init else f"flowalign.{name}"


def trainer(folder: Path, **parts):
    config = yaml.safe_load(TINY.read_text())
    given = config["trainer"]["init_args"]
    config["policy"]["roles"] = parts.pop("roles", {})
    for name, value in parts.items():
        (given["signal"] if name in given["signal"] else given)[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(str(path), [])[0].trainer


@pytest.mark.parametrize(
    ("field", "written", "expected"),
    [
        ("credit", part("credit.BranchLocal"), credit.BranchLocal()),
        ("step_weight", part("objectives.Certainty", weight=part("objectives.FlatGradient")),
         objectives.Certainty(weight=objectives.FlatGradient())),
        ("step_weight", part("objectives.Certainty"), objectives.Certainty()),
        ("credit", part("credit.SubtreeFusion", beta=0.5), credit.SubtreeFusion(0.5)),
        ("credit", part("credit.TurningPoint", first_step=False), credit.TurningPoint(first_step=False)),
        ("credit", part("credit.ReturnToGo", steps=part("credit.Gain", kind="value")),
         credit.ReturnToGo(credit.Gain("value"))),
        ("credit", part("credit.Joined", parts={"o": part("credit.Broadcast"), "p": part("credit.Process", score="prm")}),
         credit.Joined({"o": credit.Broadcast(), "p": credit.Process("prm")})),
        ("advantage", part("advantage.VarianceGated", low=0.1, high=0.2), advantage.VarianceGated("prompt", 0.1, 0.2)),
        ("advantage", part("advantage.VarianceGated", history=512), advantage.VarianceGated(history=512)),
        ("advantage", part("advantage.PromptTracker", size=32), advantage.PromptTracker(32)),
        ("advantage", part("advantage.WinRate", decimals=None), advantage.WinRate(decimals=None)),
        ("advantage", part("advantage.Asymmetric", rescale="quantiles"), advantage.Asymmetric(rescale="quantiles")),
        ("advantage", part("advantage.Mixed", advantage=part("advantage.Normalized", trim=0.1), how="gdpo",
                           weights={"a": 1.0}),
         advantage.Mixed(advantage.Normalized(trim=0.1), "gdpo", {"a": 1.0})),
        ("advantage", part("advantage.PerChannel", parts={"o": part("advantage.Normalized")}),
         advantage.PerChannel({"o": advantage.Normalized()})),
        ("objective", part("objectives.Guard", weight="inv_b"), objectives.Guard(weight="inv_b")),
        ("objective", part("objectives.ClippedRatio", clip_range=[1e-4, 2e-4]), objectives.ClippedRatio((1e-4, 2e-4))),
        ("objective", part("objectives.KLMask"), objectives.KLMask()),
        ("step_weight", part("objectives.LongCat"), objectives.LongCat()),
        ("regularizers", {"norm": part("objectives.NormGuard", beta=0.1)}, {"norm": objectives.NormGuard(0.1)}),
        ("calibration", part("trainers.GainBalance", sweeps=3, per=None), GainBalance(sweeps=3, per=None)),
        ("dynamic_clip", {"low": 1e-4, "high": 1e-3}, objectives.DynamicClip(1e-4, 1e-3)),
        ("supervision", {"sft": part("objectives.LayerTuning", target="best_leaf_fm", fade=30)},
         {"sft": objectives.LayerTuning("best_leaf_fm", fade=30)}),
        ("regularizers", {"kl": part("objectives.KLPenalty", beta=0.1)}, {"kl": objectives.KLPenalty(0.1)}),
        ("select", part("selectors.All", parts=[part("selectors.Fraction", share=0.5), part("selectors.ParentTop1")]),
         selectors.All([selectors.Fraction(0.5), selectors.ParentTop1()])),
        ("select", part("selectors.BestOfN", keep=4), selectors.BestOfN(4)),
        ("select", part("selectors.ExtremeB", b=2), selectors.ExtremeB(2)),
        ("select", part("selectors.DepthWindow", start=9, stop=15), selectors.DepthWindow(start=9, stop=15)),
        ("select", part("selectors.PositiveNegativeBalance"), selectors.PositiveNegativeBalance()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_part_is_built_as_said(tmp_path: Path, field: str, written, expected) -> None:
    built = trainer(tmp_path, **{field: written})
    assert (vars(built) | vars(built.signal))[field] == expected


@pytest.mark.parametrize(
    ("field", "written", "named"),
    [
        ("credit", part("credit.Gain", kind="gian"), "gain"),
        ("advantage", part("advantage.Normalized", trim=1.5), "trim"),
        ("objective", part("objectives.Guard", weight="inv"), "inv_h"),
        ("objective", part("objectives.ClippedRatio", clip_range=[1e-4, 0]), "clip_range"),
        ("select", part("selectors.BestOfN", keep=3), "keep"),
        ("select", part("selectors.Fraction", shrae=0.3), "shrae"),
        ("dynamic_clip", {"low": 2e-4, "high": 1e-4}, "low"),
    ],
)
def test_a_part_that_cannot_work_is_named(tmp_path: Path, field: str, written, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        trainer(tmp_path, **{field: written})


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"regularizers": {"policy": part("objectives.KLPenalty", beta=0.1)}}, "rename policy"),
        ({"supervision": {"kl": part("objectives.LayerTuning")}}, "rename kl"),
        (
            {
                "regularizers": {"kl": part("objectives.KLPenalty", beta=0.1, role="old")},
                "objective": part("objectives.Guard"), "anchor": "detach",
            },
            "role='old'.*rename the role",
        ),
    ],
)  # fmt: skip
def test_two_terms_of_a_loss_have_two_names(tmp_path: Path, parts: dict, named: str) -> None:
    """By one name one of them would be left out without a word."""
    with pytest.raises(ConfigError, match=named):
        trainer(tmp_path, roles={"old": {"update": "ema"}}, **parts)
