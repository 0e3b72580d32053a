"""HPSv3 (2508.03789): Qwen2-VL-7B trained on human preferences over a wide spectrum of images."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.image.checkpoints import check_place, find_file, read_state
from rewards.image.preprocess import Mode
from rewards.image.scorer import DTYPES, Dtype
from rewards.judges.template import Templates, Wording, load_templates
from rewards.qwen.regressor import Positions, Regressor, Rope, Turn, load_regressor
from rewards.qwen.scoring import (
    FRAME_PIXELS,
    Answers,
    check_settings,
    close_regressor,
    in_chunks,
    load_regressor_of,
    offload_regressor,
    regressed,
)
from rewards.qwen.weights import todays_names, unwrapped

TOKEN = "<|Reward|>"
WORDINGS = {
    "instruction": Wording("", ("0393599dad45a971",), "INSTRUCTION", ("{text_prompt}",)),
    "suffix": Wording("", ("2471faca094ae5bd",), "prompt_with_special_token", (TOKEN,)),
}


@dataclass(eq=False)
class HPSv3:
    """How much would people prefer this image for this prompt? μ, with uncertainty σ = exp(log σ): the head's two numbers.

    It was trained to lower E over d ~ N(μ_A - μ_B, σ_A² + σ_B²) of -log sigmoid(d) for A better than B, so μ has no bounds: its
    authors report means of -0.24 (SD 2) to 10.55 (Kolors). Code: MizzenAI/HPSv3; there sigma is given before the exp.

    model: hub id, folder or file of HPSv3.safetensors. base: hub id or folder of the model it was trained from, for its
    configuration, tokenizer and chat template. templates: where its two texts are, which are not shipped: a module or .py
    file of that code, or a folder with instruction.txt and suffix.txt. Component: noncanonical_template, 1 if they are not
    those it was trained with. pixels: of the image that it sees, about. A prompt that holds a special token of the judge has
    no score. positions to batch_size: see rewards.qwen.scoring.QwenReward.
    Not kept: gradient checkpointing; a gradient through the 7B network wants tens of GB. FileNotFoundError and ValueError say
    what to get.
    """

    model: str = "MizzenAI/HPSv3"
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    templates: str = "hpsv3.dataset.data_collator_qwen"
    pixels: int = FRAME_PIXELS
    positions: Positions = "sequential"
    rope: Rope = "bf16"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "bf16"
    device: str | None = None
    batch_size: int = 4
    name: str = "hpsv3"
    regressor: Regressor | None = field(default=None, init=False, repr=False)
    _templates: Templates = field(init=False, repr=False)

    load, close, offload = load_regressor_of, close_regressor, offload_regressor

    def __post_init__(self) -> None:
        check_settings(self)
        check_place("model", self.model)
        check_place("base", self.base)
        self._templates = load_templates(self.templates, WORDINGS)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            licence="code MIT; weights: see the card of the checkpoint",
            checkpoint=f"{self.model}; {self.base}",
            memory="L",
        )

    def build(self) -> Regressor:
        path = find_file("model", self.model, "HPSv3.safetensors")
        return load_regressor(
            todays_names(unwrapped(read_state(path))), str(path), self.base, [TOKEN], {"rm_head": 2},
            positions=self.positions, rope=self.rope, dtype=DTYPES[self.dtype],
        )  # fmt: skip

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        values, info = in_chunks(self, batch, self._ask)
        mu, log_sigma = values[:, 0, 0], values[:, 0, 1]
        return regressed(mu, info, self._templates, uncertainty=log_sigma.exp())

    def _ask(self, regressor: Regressor, batch: RewardBatch) -> Answers:
        eye, texts = regressor.eye(self.pixels, self.pixels), self._templates.texts
        return regressor([
            Turn(
                [eye(image[None], self.preprocess, self.quantize)],
                texts["instruction"].replace("{text_prompt}", prompt) + texts["suffix"],
            )
            for image, prompt in zip(batch.unit_images(), batch.prompts, strict=True)
        ])  # fmt: skip
