"""I9 for parts that do not fit each other: named before a model is loaded; what fits is let through."""

from pathlib import Path

import pytest
import yaml

from flowalign.config import TrainConfig, load_config
from flowalign.errors import ConfigError

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"
TREE = {"splits": [0, 1], "train_last": False}


def part(name: str, **init: object) -> object:
    return {"class_path": name, "init_args": init} if init else name


def kl(beta: float, **init: object) -> dict:
    return {
        "regularizers": {"kl": {"class_path": "flowalign.objectives.KLPenalty", "init_args": {"beta": beta, **init}}}
    }


def plan(name: str, **init: object) -> object:
    return part(f"samplers.{name}", **init)


def credit(name: str, **init: object) -> object:
    return part(f"flowalign.credit.{name}", **init)


def within(sets: str) -> object:
    return part("flowalign.advantage.Normalized", within=sets)


def load(folder: Path, rollout: dict, trainer: dict) -> TrainConfig:
    config = yaml.safe_load(TINY.read_text())
    config["rollout"] |= {"num_inference_steps": 4, "group_size": 4, **rollout}
    given = config["trainer"]["init_args"]
    for name, value in trainer.items():
        (given["signal"] if name in given["signal"] else given)[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return load_config(str(path), [])[0]


@pytest.mark.parametrize(
    ("rollout", "trainer"),
    [
        ({"plan": plan("Probed", plan=plan("Chain"))},
         {"credit": credit("Gain"), "advantage": within("prompt_step")}),
        ({"plan": plan("Probed", plan=plan("Chain"), steps=1)},
         {"credit": credit("TurningPoint"), "advantage": within("prompt_step")}),
        ({"plan": plan("Probed", plan=plan("Chain"))},  # the outcome beside the gains
         {"credit": credit("Joined", parts={"outcome": credit("Broadcast"), "gain": credit("Gain")}),
          "advantage": part("flowalign.advantage.PerChannel",
                            parts={"outcome": within("prompt"), "gain": within("prompt_step")})}),
        ({"kernel": "samplers.CPS"}, kl(1e-4, form="exact")),
        ({"plan": plan("Probed", steps=5, plan=plan("Window", size=2, low=1, high=3)), "kernel": "samplers.StepwiseSDE"},
         {"credit": credit("Gain"), **kl(1e-4, form="exact")}),
        ({"guidance_scale": 4.5, "detach_uncond": True, "plan": plan("Chain")}, {}),
        ({"plan": plan("Branch", branches=2, count=1)},
         {"credit": credit("BranchLocal"), "advantage": within("seed_step")}),
        ({"plan": plan("SplitTree", **TREE)},
         {"credit": credit("SubtreeFusion"), "advantage": within("tree_depth"),
          "select": part("flowalign.selectors.ParentTop1")}),
        ({"plan": plan("TreeWindow", depth=2)}, {"dynamic_clip": {}, "supervision": {"sft": part("flowalign.objectives.LayerTuning")}}),
        ({"plan": plan("Selected", plan=plan("Chain"), counts={2: 2})}, {}),
        ({"plan": plan("Sourced", plan=plan("Chain"), teacher=1), "sources": {"teacher": "reference"}}, {}),
        ({"plan": plan("Selected", plan=plan("Chain", train_last=True), counts={4: 2}, preview_steps=0)}, {}),  # no preview
        ({"plan": plan("Window", size=1)},  # where the window is drawn, and what is left out of it: not in every iteration
         {"select": part("flowalign.selectors.DepthWindow", size=2, start=0, stop=0)}),
    ],
    ids=["DenseGRPO", "TP-GRPO", "outcome and gain", "CPS", "Stepwise-Flow-GRPO", "half the guidance", "TempFlow", "BranchGRPO",
         "Dynamic-TreeRPO", "path search", "a teacher", "best of n", "moving"],
)  # fmt: skip
def test_methods_are_let_through(tmp_path: Path, rollout: dict, trainer: dict) -> None:
    config = load(tmp_path, rollout, trainer)
    for built, expected in (
        (config.rollout.plan, rollout.get("plan", "Window")),
        (config.trainer.signal.credit, trainer.get("credit", "Broadcast")),
    ):
        assert type(built).__name__ in str(expected)
    assert config.rollout.plan.forecast(4, 4).edges >= 2


@pytest.mark.parametrize(
    ("rollout", "trainer", "named"),
    [
        ({"plan": plan("Chain")}, {"credit": credit("Gain")}, "samplers.Probed"),
        ({"plan": plan("Branch", branches=2)}, {"credit": credit("Gain")}, "samplers.Probed"),
        ({"plan": plan("Window", size=2, high=3)}, {"credit": credit("TurningPoint")}, "samplers.Probed"),
        ({"plan": plan("Probed", plan=plan("SplitTree", **TREE))}, {"credit": credit("TurningPoint")}, "take Gain"),
        ({}, {"credit": credit("Process", score="prm")}, "Name a latent reward with this channel under process_rewards"),
        ({"plan": plan("Chain")}, {"advantage": within("tree_depth")}, "take a wider set"),
        ({}, {"select": part("flowalign.selectors.Fraction", share=0.5)}, "leaves out every step"),
        ({}, {"advantage": part("flowalign.advantage.PerChannel", parts={"ocr": within("prompt")})},
         "Take the advantage alone"),
        ({}, {"advantage": part("flowalign.advantage.Mixed", advantage=within("prompt"), how="gdpo")},
         r"one channel, .* for Mixed\(how='gdpo'\)"),
        ({"plan": plan("Probed", plan=plan("Chain"))}, {}, "which reads none of them"),
        ({"plan": plan("Probed", plan=plan("SplitTree", **TREE))}, {"credit": credit("SubtreeFusion")}, "Gain, TurningPoint"),
        ({"kernel": "samplers.CPS"}, kl(0.04), "regularizers.kl: .*form=exact"),
        ({"detach_uncond": True}, {}, "silently do nothing"),
        ({"plan": plan("TreeWindow", depth=2), "kernel": "samplers.CPS"}, kl(0), "at most 1, where CPS"),
        ({"plan": plan("SplitTree", splits=[0, 1], train_last=True), "kernel": "samplers.CPS"}, kl(0), "train_last=false"),
        ({"plan": plan("Chain"), "kernel": "samplers.StepwiseSDE"}, kl(0), "trains the first step.*low=1"),
        ({"plan": plan("Sourced", plan=plan("Chain"), teacher=1)}, {}, "teacher=0"),
        ({"plan": plan("Sourced", plan=plan("Chain"), hinted=1)}, {}, "a hint_key for hinted samples"),
        ({"plan": plan("Sourced", plan=plan("Chain"), teacher=1), "sources": {"teacher": "old"}}, {},
         r"add \['old'\] to policy.roles"),
        ({"sources": {"teacher": "reference"}}, {}, "expected only what the plan has"),
        ({"hint_key": "words"}, {}, "expected only what the plan has"),
        ({"plan": plan("Sourced", plan=plan("Chain"), hinted=1), "hint_key": "hint"}, {}, "got None under 'hint' of prompt 0"),
        ({"plan": plan("Selected", plan=plan("Chain"), counts={2: 2}, preview_steps=0)}, {}, "preview_steps=1"),
        ({}, {"objective": part("flowalign.objectives.KLMask"), "dynamic_clip": {}}, "dynamic_clip=null"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(tmp_path: Path, rollout: dict, trainer: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, rollout, trainer)


def test_a_target_of_another_noising_law_is_named(tiny_sd15_pipeline: Path) -> None:
    tuning = "{class_path: flowalign.objectives.LayerTuning, init_args: {target: best_leaf_fm}}"
    overrides = [f"policy.path={tiny_sd15_pipeline}", f"trainer.supervision.sft={tuning}"]
    with pytest.raises(ConfigError, match="take best_path_velocity"):
        load_config(str(TINY.with_name("tiny_sd15.yaml")), overrides)
    overrides[1] = "trainer.step_weight=flowalign.objectives.LongCat"
    with pytest.raises(ConfigError, match="take FlatGradient"):
        load_config(str(TINY.with_name("tiny_sd15.yaml")), overrides)


def test_steps_that_do_not_divide_the_levels_of_a_discrete_model_are_no_error(tiny_sd15_pipeline: Path) -> None:
    overrides = [f"policy.path={tiny_sd15_pipeline}", "rollout.num_inference_steps=3", "rollout.plan.train_last=false"]
    config, _ = load_config(str(TINY.with_name("tiny_sd15.yaml")), overrides)
    assert config.rollout.num_inference_steps == 3
