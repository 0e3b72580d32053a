"""EditReward (2509.26346): instruction following and quality of image edits, by a Qwen2.5-VL-7B with two heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.image.checkpoints import check_place, read_state
from rewards.image.preprocess import Mode
from rewards.image.scorer import DTYPES, Dtype, check_choice
from rewards.judges.template import Templates, Wording, load_templates
from rewards.qwen.hpsv3 import TOKEN
from rewards.qwen.regressor import Positions, Regressor, Rope, Turn, load_regressor
from rewards.qwen.scoring import (
    FRAME_PIXELS,
    Answers,
    check_settings,
    check_unit,
    close_regressor,
    in_chunks,
    load_regressor_of,
    offload_regressor,
    regressed,
)
from rewards.qwen.vision import Eye, Patches
from rewards.qwen.weights import find_first, todays_names, unwrapped

GLYPHS = Path(__file__).parent / "glyphs_edit"  # made by scripts/train_edit_reward.py
HEADS = {"head_0": "instruction_following", "head_1": "quality"}  # and the template that each was trained with
PROMPTS = {
    "instruction_following": Wording("", ("da5bfc26898cc8e0",), "INSTRUCTION_EDIT_FOLLOWING", ("{text_prompt}",)),
    "quality": Wording("", ("89bbc5c2ac1bbea9",), "INSTRUCTION_EDIT_QUALITY", ("{text_prompt}",)),
}
SUFFIX = {"suffix": Wording("", ("2471faca094ae5bd",), "prompt_with_special_token", (TOKEN,))}
Pooling = Literal["mean", "min", "none"]


@dataclass(eq=False)
class EditReward:
    """How good is this edit of the source image, as the prompt asks for it? Of each head μ and log σ; here pooled (2509.26346).

    Head 0 answers the template of instruction following, head 1 that of quality; both see the source image (the sample's first
    condition), the result, then the text. pooling: "mean" (as published) is the mean of both μ, with uncertainty exp(mean of
    both log σ); "min" the smaller of each; "none" two channels, instruction_following and quality. μ is typically in -3..2,
    without bounds. Code: TIGER-AI-Lab/EditReward, where the second number is log σ, and no second quality.

    Components: instruction_following, quality, noncanonical_template. model: hub id, folder or file of model.safetensors or
    model.pth. base: hub id or folder of the model it was trained from. templates: where its three texts are, which are not
    shipped: the installed package "EditReward", or a folder with instruction_following.txt, quality.txt and suffix.txt. "glyphs", for all
    three: a small one that comes with this package and knows changes of ink and paper of Glyphs, of 24 × 48 pixels (pixels=1152).
    pixels: of each image that it sees, about. positions to batch_size: see rewards.qwen.scoring.QwenReward. A sample without
    a source image, or whose prompt holds a special token, has no score. FileNotFoundError and ValueError say what to get.
    Not kept: heads on Qwen3-VL."""

    model: str = "TIGER-Lab/EditReward-Qwen2.5-VL-7B"
    base: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    templates: str = "EditReward"
    pooling: Pooling = "mean"
    pixels: int = FRAME_PIXELS
    positions: Positions = "sequential"
    rope: Rope = "bf16"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "bf16"
    device: str | None = None
    batch_size: int = 4
    name: str = "edit_reward"
    regressor: Regressor | None = field(default=None, init=False, repr=False)
    _templates: Templates = field(init=False, repr=False)

    load, close, offload = load_regressor_of, close_regressor, offload_regressor

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("pooling", self.pooling, Pooling)
        check_place("model", self.model)
        check_place("base", self.base)
        self._templates = _load_templates(self.templates)

    @property
    def spec(self) -> RewardSpec:
        own = self.model == "glyphs"
        return RewardSpec(
            inputs=("images", "conditions"),
            channels=tuple(HEADS.values()) if self.pooling == "none" else (),
            differentiable=self.preprocess == "tensor",
            licence=f"code MIT; weights{' Apache-2.0' if own else ': see the card of the checkpoint'}",
            checkpoint=f"{self.model}; {self.base}",
            memory="cpu" if own else "L",
        )

    def build(self) -> Regressor:
        path = find_first("model", _place(self.model), ("model.safetensors", "model.pth"))
        return load_regressor(
            todays_names(unwrapped(read_state(path))), str(path), _place(self.base), [TOKEN], dict.fromkeys(HEADS, 2),
            positions=self.positions, rope=self.rope, dtype=DTYPES[self.dtype],
        )  # fmt: skip

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        values, info = in_chunks(self, batch, self._ask)
        parts = dict(zip(HEADS.values(), values[..., 0].unbind(1), strict=True))
        mu, log_sigma = self._pooled(values).unbind(-1)
        return regressed(mu, info, self._templates, parts, log_sigma.exp())

    def _pooled(self, values: Tensor) -> Tensor:
        """[n, 2], or [n, 2, 2] as it is, of values [n, heads, (μ, log σ)]."""
        if self.pooling == "none":
            return values
        return values.mean(1) if self.pooling == "mean" else values.amin(1)

    def _ask(self, regressor: Regressor, batch: RewardBatch) -> Answers:
        assert batch.conditions is not None
        eye, images = regressor.eye(self.pixels, self.pixels), batch.unit_images()
        seen = [self._see(eye, images[row], sources) for row, sources in enumerate(batch.conditions)]
        answers = []
        for head, template in HEADS.items():
            text = self._templates.texts[template]
            turns = [
                pair if isinstance(pair, str)
                else Turn(pair, text.replace("{text_prompt}", prompt) + self._templates.texts["suffix"])
                for pair, prompt in zip(seen, batch.prompts, strict=True)
            ]  # fmt: skip
            answers.append(regressor(turns, head))
        return torch.cat([values for values, _ in answers], 1), answers[0][1]

    def _see(self, eye: Eye, image: Tensor, sources: list[Tensor]) -> list[Patches] | str:
        """The source and the result, or why there is none."""
        if not sources:
            return "no source image: its conditions are empty"
        check_unit(sources[0], "a condition")
        return [eye(one[None], self.preprocess, self.quantize) for one in (sources[0].to(image), image)]


def _place(name: str) -> str:
    """Where a model or a base is."""
    return str(GLYPHS) if name == "glyphs" else name


def _load_templates(source: str) -> Templates:
    """From a folder of all three texts, or from a package, where they stand in two modules."""
    if source == "glyphs":
        return load_templates(str(GLYPHS / "templates"), PROMPTS | SUFFIX)
    if Path(source).exists():
        return load_templates(source, PROMPTS | SUFFIX)
    prompts = load_templates(f"{source}.dataset.prompts", PROMPTS)
    suffix = load_templates(f"{source}.dataset.data_collator_qwen_edit", SUFFIX)
    return Templates({**prompts.texts, **suffix.texts}, prompts.noncanonical or suffix.noncanonical)
