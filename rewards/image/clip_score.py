"""CLIPScore: the cosine between an image and its prompt in CLIP's space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from rewards.base import RewardSpec
from rewards.image.checkpoints import check_place
from rewards.image.clip import Clip, load_clip
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

Scale = Literal["cosine", "cosine_100", "logit_over_30", "clipscore"]
OPENAI = "openai/clip-vit-large-patch14"
OTHERS = "code MIT; weights of OpenAI and laion MIT; others: see their card (Apple's DFN has a licence of its own)"


@dataclass(eq=False)
class CLIPScore:
    """Does the image show what the prompt says? Cosine of CLIP's unit vectors, in a scale that is named.

    scale: what is returned, for the cosine c (typically 0.2 to 0.4):
      "cosine"         c: X-GenGroup/Flow-Factory, Tencent-Hunyuan/MixGRPO
      "cosine_100"     100 c: ExplainableML/ReNO, whose loss is 100 minus it
      "logit_over_30"  exp(logit_scale) c / 30, about 100 c / 30: CostaliyA/Flow-OPD
      "clipscore"      2.5 max(c, 0): the published metric (2104.08718); no gradient where c < 0
    Within groups GRPO's advantages do not see the scale; sums of rewards and a global standard deviation do.

    model: a hub id or folder of transformers, or, for open_clip, "hf-hub:owner/name" (hf-hub:apple/DFN5B-CLIP-ViT-H-14-384
    in MixGRPO) or a folder with open_clip_config.json, weights and a tokenizer (and no config.json, else "local-dir:folder");
    activation, image size and normalization come with it. "glyphs": a small one that comes with this package and knows the
    prompts of Glyphs only (figures and limits in its README.md). tokenizer: if it lies elsewhere. Prompts are cut to the
    model's context (77). preprocess to batch_size: see rewards.image.scorer.Settings. FileNotFoundError and ValueError, when
    it is loaded, say what to get.
    """

    model: str = OPENAI
    scale: Scale = "cosine"
    tokenizer: str | None = None
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 32
    name: str = "clip_score"
    scorer: Scorer | None = field(default=None, init=False, repr=False)

    __call__, load, close, offload = call_scorer, load_scorer, close_scorer, offload_scorer

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("scale", self.scale, Scale)
        check_place("model", self.model)
        check_place("tokenizer", self.tokenizer)

    @property
    def spec(self) -> RewardSpec:
        ranges = {"cosine": (-1, 1), "cosine_100": (-100, 100), "logit_over_30": None, "clipscore": (0, 2.5)}
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            range=ranges[self.scale],
            licence="code and weights Apache-2.0" if self.model == "glyphs" else OTHERS,
            checkpoint=self.model,
            memory="cpu" if self.model == "glyphs" else "S" if self.model == OPENAI else "M",
        )

    def build(self) -> Scorer:
        clip = load_clip(self.model, self.tokenizer, DTYPES[self.dtype])

        def score(pixels: Tensor, prompts: list[str]) -> Tensor:
            return self._scaled(clip.cosine(pixels, prompts), clip)

        return Scorer(clip.network, clip.preprocess, score)

    def _scaled(self, cosine: Tensor, clip: Clip) -> Tensor:
        if self.scale == "clipscore":
            return 2.5 * cosine.clamp(min=0)
        factors = {"cosine": 1.0, "cosine_100": 100.0, "logit_over_30": clip.scale / 30}
        return factors[self.scale] * cosine
