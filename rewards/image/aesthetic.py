"""LAION's aesthetic score: how much people like a picture, whatever was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from torch import Tensor, nn

from rewards.base import RewardSpec
from rewards.image.checkpoints import check_place, pretrained_network, read_state
from rewards.image.heads import head_of
from rewards.image.preprocess import Mode, Preprocess
from rewards.image.scorer import (
    DTYPES,
    Dtype,
    Scorer,
    at_least_fp32,
    call_scorer,
    check_settings,
    close_scorer,
    frozen,
    load_scorer,
    offload_scorer,
    unit,
)

SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


@dataclass(eq=False)
class Aesthetic:
    """A head on the unit embedding of OpenAI's CLIP, trained towards ratings from 1 to 10; the prompt is ignored.

    s = head(f(x) / |f(x)|), f: ViT-L/14 at 224 pixels with its projection, 768 numbers. Photos score about 4.5 to 6.
    Code and heads: christophschuhmann/improved-aesthetic-predictor (v2) and LAION-AI/aesthetic-predictor (v1); the keys of
    the file show which it is (rewards.image.heads). Scores of different heads do not compare.

    head: the file, which is not on the hub: download it from the repository's page. clip: folder or hub id; v1's 512-wide
    heads need "openai/clip-vit-base-patch32" or "-patch16". preprocess to batch_size: see rewards.image.scorer.Settings.
    FileNotFoundError and ValueError, when it is loaded, name what is missing and where to get it.

    Not kept: the linear heads are one affine map, so every image is pushed along the same direction of the embedding, which
    is easy to hack.
    """

    head: str = "sac+logos+ava1-l14-linearMSE.pth"
    clip: str = "openai/clip-vit-large-patch14"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 64
    name: str = "aesthetic"
    scorer: Scorer | None = field(default=None, init=False, repr=False)

    __call__, load, close, offload = call_scorer, load_scorer, close_scorer, offload_scorer

    def __post_init__(self) -> None:
        check_settings(self)
        check_place("head", self.head)
        check_place("clip", self.clip)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            licence="code Apache-2.0 (v2) or MIT (v1); weights of the head likewise, of CLIP MIT",
            checkpoint=f"{self.clip}, {self.head}",
            memory="S",
        )

    def build(self) -> Scorer:
        from transformers import CLIPVisionModelWithProjection

        path = Path(self.head).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"got head={self.head!r}, which is no file (working directory: {Path.cwd()}); expected a head of LAION's: "
                f"download {SOURCE}/raw/main/{quote(path.name)} and set head to where it is"
            )
        head, dtype = head_of(read_state(path), str(path)), DTYPES[self.dtype]
        tower = pretrained_network(CLIPVisionModelWithProjection, "clip", self.clip, dtype)
        width = next(head.parameters()).shape[1]
        if width != tower.config.projection_dim:
            raise ValueError(
                f"got head={self.head!r} for embeddings of {width} numbers; expected {tower.config.projection_dim}, "
                f"as clip={self.clip!r} makes: take the CLIP that the head was trained on"
            )
        frozen(tower, dtype)
        frozen(head, at_least_fp32(dtype))

        def score(pixels: Tensor, prompts: list[str]) -> Tensor:
            return head(unit(tower(pixel_values=pixels).image_embeds))[:, 0]

        # the image processor's crop
        return Scorer(
            nn.ModuleList([tower, head]).eval(), Preprocess(tower.config.image_size, crop_offset="floor"), score
        )
