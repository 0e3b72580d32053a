"""SourceSimilarity: how much of what its source image shows an edit still shows, in CLIP's space."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.image.checkpoints import check_place
from rewards.image.clip import Clip, load_clip
from rewards.image.clip_score import OPENAI, OTHERS
from rewards.image.preprocess import Mode
from rewards.image.scorer import DTYPES, Dtype, at_least_fp32, check_settings, unit


@dataclass(eq=False)
class SourceSimilarity:
    """Cosine of CLIP's unit vectors of the edit and of its source image, the sample's first condition, in [-1, 1]; an image that nothing
    was done to has 1, so it is for a mix with a reward of the instruction. yifan123/flow_grpo: image_similarity, half of the reward of
    counting_flux_kontext and a fifth of that of counting_qwenimage_edit.

    It sees what is shown, at 224 × 224 pixels, not which pixels were kept. model: as in CLIPScore. preprocess to batch_size: see
    rewards.image.scorer.Settings. A sample without a source image has no score."""

    model: str = OPENAI
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 32
    name: str = "source_similarity"
    scorer: Clip | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_settings(self)
        check_place("model", self.model)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            inputs=("images", "conditions"),
            differentiable=self.preprocess == "tensor",
            range=(-1, 1),
            licence="code and weights Apache-2.0" if self.model == "glyphs" else OTHERS,
            checkpoint=self.model,
            memory="cpu" if self.model == "glyphs" else "S" if self.model == OPENAI else "M",
        )

    def load(self) -> None:
        if self.scorer is None:
            self.scorer = load_clip(self.model, None, DTYPES[self.dtype])

    def close(self) -> None:
        self.scorer = None

    def offload(self) -> None:
        if self.scorer is not None:
            self.scorer.network.to("cpu")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.load()
        assert self.scorer is not None and batch.conditions is not None
        device = self.device or batch.unit_images().device
        self.scorer.network.to(device)
        sources = [images[0] if images else None for images in batch.conditions]
        edited = self._vectors(list(batch.unit_images()))
        known = iter(self._vectors([each for each in sources if each is not None]))
        kept = [torch.nan * row if each is None else next(known) for each, row in zip(sources, edited, strict=True)]
        scores = (edited * torch.stack(kept)).sum(1)
        info = ["no source image: its conditions are empty" if each is None else "" for each in sources]
        return RewardOutput(scores if torch.is_grad_enabled() else scores.float(), torch.isfinite(scores), info=info)

    def _vectors(self, images: list[Tensor]) -> Tensor:
        """Unit vectors [n, D] of n images [3, H, W] of any sizes, each made ready alone."""
        assert self.scorer is not None
        device, dtype = next(self.scorer.network.parameters()).device, DTYPES[self.dtype]
        wide = [image[None].to(device, at_least_fp32(dtype)) for image in images]
        ready = [self.scorer.preprocess(image, self.preprocess, self.quantize).to(dtype) for image in wide]
        parts = [ready[first : first + self.batch_size] for first in range(0, len(ready), self.batch_size)]
        vectors = [unit(self.scorer.images(torch.cat(part))) for part in parts]
        return torch.cat(vectors) if vectors else torch.zeros(0, 1, device=device)
