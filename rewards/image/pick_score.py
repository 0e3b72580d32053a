"""PickScore (2305.01569): CLIP trained on the choices of users of Pick-a-Pic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rewards.base import RewardSpec
from rewards.image.checkpoints import check_place
from rewards.image.clip import load_clip
from rewards.image.preprocess import Mode
from rewards.image.scorer import (
    DTYPES,
    Dtype,
    Scorer,
    call_scorer,
    check_choice,
    check_settings,
    close_scorer,
    load_scorer,
    offload_scorer,
)

Scale = Literal["logit", "logit_over_26", "cosine"]


@dataclass(eq=False)
class PickScore:
    """Which image would a user pick for this prompt? s = exp(logit_scale) · cos(image, prompt), about 100 cos.

    Typically 17 to 24. scale: "logit" is s, the paper's; "logit_over_26" is s / 26 (yifan123/flow_grpo); "cosine" is without
    the logit scale (XueZeyue/DanceGRPO). model: hub id or folder of a CLIPModel of transformers (ViT-H/14). tokenizer: if it
    lies elsewhere, as laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which is the same. Prompts are cut to 77 tokens. preprocess to
    batch_size: see rewards.image.scorer.Settings. FileNotFoundError and ValueError, when it is loaded, say what to get.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    scale: Scale = "logit"
    tokenizer: str | None = None
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 32
    name: str = "pick_score"
    scorer: Scorer | None = field(default=None, init=False, repr=False)

    __call__, load, close, offload = call_scorer, load_scorer, close_scorer, offload_scorer

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("scale", self.scale, Scale)
        check_place("model", self.model)
        check_place("tokenizer", self.tokenizer)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            range=(-1, 1) if self.scale == "cosine" else None,
            licence="code MIT; weights: see the card of the checkpoint",
            checkpoint=self.model,
            memory="M",
        )

    def build(self) -> Scorer:
        clip = load_clip(self.model, self.tokenizer, DTYPES[self.dtype])
        factor = {"logit": clip.scale, "logit_over_26": clip.scale / 26, "cosine": 1.0}[self.scale]

        def score(pixels: Tensor, prompts: list[str]) -> Tensor:
            return factor * clip.cosine(pixels, prompts)

        return Scorer(clip.network, clip.preprocess, score)
