"""VideoReward of VideoAlign (2501.13918): visual quality, motion quality and text alignment of videos, by Qwen2-VL-2B."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.image.checkpoints import check_place, read_state
from rewards.image.preprocess import Mode
from rewards.image.scorer import DTYPES, Dtype
from rewards.judges.template import Templates, Wording, load_templates
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
from rewards.qwen.weights import State, find_folder, merge_lora, read_shards, todays_names, unwrapped

Dimension = Literal["VQ", "MQ", "TA"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
TOKENS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
WORDINGS = {
    "template": Wording(
        "", ("fdb6309bac618dd0",), "DETAILED_PROMPT_WITH_SPECIAL_TOKEN", ("{text_prompt}", *TOKENS)
    )
}  # fmt: skip
MIN_FRAMES, MAX_FRAMES = 4, 768  # and the limits of its reader (kq-chen/qwen-vl-utils)
MIN_FRAME_PIXELS = 100_352
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
Output = Literal["dimensions", "overall"]


@dataclass(eq=False)
class VideoAlign:
    """Three channels: visual quality VQ, motion quality MQ, text alignment TA, each (r - mean) / std (2501.13918).

    r is the head's number at the dimension's token. Raw numbers are arbitrary, since training compared videos only; mean and
    std are those of its validation set. Tokens stand in the order VQ, MQ, TA and attention is causal, so only TA reads the
    prompt. Code: KwaiVGI/VideoAlign.

    dimensions: which of them; DanceGRPO (2505.07818) has VQ, MQ or both, and of image to video MQ alone.
    output: "overall" is one channel, the sum of `dimensions`. Components: what of overall and the three is no channel,
    noncanonical_template.
    sample_fps: frames that are seen per second, evenly spread over the video, an even number, from 4 (fewer of a shorter
    video) to 768; so the video's own fps matter, and RewardBatch asks for them. gray_motion: MQ is of a gray copy of the
    video, in a second pass (ModelTC/GenRL), so that color cannot raise it. min_pixels, max_pixels: of a frame.

    templates: where its text is, which is not shipped: prompt_template.py of that code, or a .txt file. model: hub id or
    folder with model_config.json and checkpoint-<step>/, of which the last is taken: model.pth, or adapter_model.safetensors
    and non_lora_state_dict.pth, which are merged with the weights of `base`. base: hub id or folder of the model it was
    trained from. positions to batch_size: see rewards.qwen.scoring.QwenReward. A prompt that holds a special token has no
    score. FileNotFoundError and ValueError say what to get.
    Not kept: a fixed number of frames, and the settings in model_config.json other than those of LoRA."""

    templates: str
    model: str = "KwaiVGI/VideoReward"
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    output: Output = "dimensions"
    dimensions: tuple[Dimension, ...] = DIMENSIONS
    mean: tuple[float, float, float] = (3.6757, 1.1646, 2.8105)
    std: tuple[float, float, float] = (2.2476, 1.3811, 2.5121)
    sample_fps: float = 2.0
    gray_motion: bool = False
    min_pixels: int = MIN_FRAME_PIXELS
    max_pixels: int = FRAME_PIXELS
    positions: Positions = "sequential"
    rope: Rope = "bf16"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "bf16"
    device: str | None = None
    batch_size: int = 2
    name: str = "video_align"
    regressor: Regressor | None = field(default=None, init=False, repr=False)
    _templates: Templates = field(init=False, repr=False)

    load, close, offload = load_regressor_of, close_regressor, offload_regressor

    def __post_init__(self) -> None:
        check_settings(self)
        if self.output not in get_args(Output):
            raise ValueError(f"got output={self.output!r}; expected one of {get_args(Output)}")
        named = set(self.dimensions)
        if not named or not named <= set(DIMENSIONS) or len(named) < len(self.dimensions):
            raise ValueError(f"got dimensions={self.dimensions}; expected one or several of {DIMENSIONS}, each once")
        if self.gray_motion and "MQ" not in named:
            raise ValueError(
                f"got gray_motion with dimensions={self.dimensions}; expected MQ among them, which it changes"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0 or self.sample_fps <= 0:
            raise ValueError(
                f"got mean={self.mean}, std={self.std}, sample_fps={self.sample_fps}; expected three numbers each for {DIMENSIONS}, "
                "std and sample_fps above 0"
            )
        check_place("model", self.model)
        check_place("base", self.base)
        self._templates = load_templates(self.templates, WORDINGS)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            inputs=("videos",),
            channels=tuple(self.dimensions) if self.output == "dimensions" else (),
            differentiable=self.preprocess == "tensor",
            licence="code MIT; weights Apache-2.0",
            checkpoint=f"{self.model}; {self.base}",
            memory="M",
        )

    def build(self) -> Regressor:
        folder = find_folder("model", self.model)
        return load_regressor(
            read_video_reward(folder, self.base), str(folder), self.base, TOKENS, {"rm_head": 1},
            media="video", positions=self.positions, rope=self.rope, dtype=DTYPES[self.dtype],
        )  # fmt: skip

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        values, info = in_chunks(self, batch, self._ask)
        scores = (values[..., 0] - values.new_tensor(self.mean)) / values.new_tensor(self.std)
        chosen = scores[:, [DIMENSIONS.index(name) for name in self.dimensions]]
        parts = {"overall": chosen.sum(1)} | dict(zip(DIMENSIONS, scores.unbind(1), strict=True))
        channels = self.spec.channels or ("overall",)
        answer = chosen if self.spec.channels else parts["overall"]
        return regressed(
            answer, info, self._templates, {name: part for name, part in parts.items() if name not in channels}
        )

    def _ask(self, regressor: Regressor, batch: RewardBatch) -> Answers:
        if batch.videos is None or batch.fps is None:
            raise ValueError("got a batch without videos; expected videos and their fps")
        check_unit(batch.videos, "videos")
        videos = batch.videos[:, frame_numbers(batch.videos.shape[1], batch.fps, self.sample_fps)]
        values, info = self._watch(regressor, videos, batch.prompts)
        if self.gray_motion:
            motion, _ = self._watch(regressor, gray(videos), batch.prompts)
            values = torch.cat([values[:, :1], motion[:, 1:2], values[:, 2:]], 1)
        return values, info

    def _watch(self, regressor: Regressor, videos: Tensor, prompts: list[str]) -> Answers:
        eye, text = regressor.eye(self.min_pixels, self.max_pixels), self._templates.texts["template"]
        return regressor([
            Turn([eye(video, self.preprocess, self.quantize)], text.replace("{text_prompt}", prompt))
            for video, prompt in zip(videos, prompts, strict=True)
        ])  # fmt: skip


def frame_numbers(frames: int, fps: float, sample_fps: float) -> list[int]:
    """Which of the `frames` are seen: the nearest even number to sample_fps per second, in [4, 768] and at most the even part
    of `frames`; evenly from the first to the last, rounded half to even. ValueError for less than 2 frames."""
    if frames < 2:
        raise ValueError(f"got videos of {frames} frame; expected at least 2")
    largest = min(MAX_FRAMES, frames) // 2 * 2
    wanted = min(max(frames / fps * sample_fps, MIN_FRAMES), largest)
    numbers: list[int] = torch.linspace(0, frames - 1, round(wanted / 2) * 2).round().long().tolist()
    return numbers


def gray(videos: Tensor) -> Tensor:
    """The luma of [..., 3, H, W] in all three colors."""
    luma = (videos * videos.new_tensor(LUMA)[:, None, None]).sum(-3, keepdim=True)
    return luma.expand_as(videos)


def read_video_reward(folder: Path, base: str) -> State:
    """The tensors of the last checkpoint-<step> in `folder`, with its LoRA merged; see VideoAlign.model."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    if not steps or not (folder / "model_config.json").is_file():
        raise FileNotFoundError(f"got {folder} without checkpoint-<step> or model_config.json; expected both in it")
    lora = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))["peft_lora_config"]
    whole = steps[-1] / "model.pth"
    if whole.is_file():
        state = todays_names(unwrapped(read_state(whole)))
    else:
        parts = [steps[-1] / name for name in ("non_lora_state_dict.pth", "adapter_model.safetensors")]
        if lacks := [path.name for path in parts if not path.is_file()]:
            raise FileNotFoundError(
                f"got {steps[-1]} without model.pth and without {lacks}; expected one, or the other two"
            )
        state = todays_names(read_shards(find_folder("base", base)))
        for path in parts:
            state |= todays_names(read_state(path))
    return merge_lora(state, lora["lora_alpha"], lora["use_rslora"])
