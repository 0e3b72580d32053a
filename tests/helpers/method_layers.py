"""The layers of configs/methods, by kind of trainer, and what a layer of another trainer than the policy gradient needs."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "configs" / "methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def class_of(part: Any) -> str:
    """The import path of a part as a layer writes it: a text, or a mapping with class_path."""
    return str(part if isinstance(part, str) else part["class_path"])


def trainer_of(method: str) -> str:
    """The import path of the trainer that a layer names."""
    return class_of(yaml.safe_load((FOLDER / f"{method}.yaml").read_text())["trainer"])


POLICY_GRADIENTS = [method for method in METHODS if trainer_of(method) == "flowalign.trainers.PolicyGradient"]
# their students learn from a teacher, which a run gives them: tests/methods/test_taught.py
TAUGHT = [method for method in METHODS if trainer_of(method) == "flowalign.trainers.Distillation"]
OTHERS = [method for method in METHODS if method not in POLICY_GRADIENTS]

# Methods that train by the gradient of the reward, and the layer of configs/rewards that they take on Glyphs: rewards
# without a gradient, OCR among them, are refused.
BY_REWARD_GRADIENT: dict[str, str] = dict.fromkeys(
    ("refl", "draft", "draft_k", "draft_lv", "alignprop", "drtune", "srpo"), "clip_glyphs"
)
# Methods that train on images of files: on the bed they have tests of their own, in tests/trainers/test_image_samples.py.
OFFLINE = ("diffusion_dpo_offline", "fm_sft")
# Overrides that a method needs on Glyphs beside its layers, such as the folder of a teacher.
ON_GLYPHS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("flow_opd", "diffusion_opd", "dance_opd"), ("policy.roles.teacher={init: reference}",)),
    **{
        method: (f"trainer.source.init_args.file=tests/data/images/{name}.jsonl", "policy.height=24", "policy.width=48")
        for method, name in zip(OFFLINE, ("pairs", "labeled"), strict=True)
    },
}


def reward_of(method: str) -> str:
    """The layer of configs/rewards with which the method trains on Glyphs."""
    return BY_REWARD_GRADIENT.get(method, "ocr_glyphs")


def glyphs_layers(method: str) -> list[str]:
    """The files of a method on Glyphs."""
    return [f"configs/methods/{method}.yaml", "configs/models/glyphs.yaml", f"configs/rewards/{reward_of(method)}.yaml"]
