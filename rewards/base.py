"""The contract of a reward: a batch of samples in, scores out.

A sample that cannot be scored is NaN with valid False; a reward that cannot score at all is a RewardError.
Neither ever becomes 0, -1 or a mid-score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class RewardError(RuntimeError):
    """A reward could not score a batch; the message names the reward."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardBatch:
    """N samples to be scored. Every list has N entries, every tensor N rows.

    images [N, 3, H, W]: RGB in [0, 1]; uint8 in 0..255 is converted here, other floats become float32.
    Images lie on the policy's device, and on the CPU when a run tries the reward before the model is loaded: move them to the
    reward's own device. metadata: what the prompt set holds about each prompt (targets, colors, ...). sample_ids: names of the samples in
    messages. group_ids: equal for samples of the same prompt. Both default to 0..N-1, so each sample is its own group.
    ValueError or TypeError for fields of unequal length and for images of another shape or dtype.
    """

    prompts: list[str]
    images: Tensor | None = None
    metadata: list[dict[str, Any]] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    group_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        fill = {
            "metadata": self.metadata or [{} for _ in range(count)],
            "sample_ids": self.sample_ids or list(range(count)),
            "group_ids": self.group_ids or list(range(count)),
            "images": None if self.images is None else _unit_float(self.images),
        }
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        sizes = {name: len(value) for name, value in vars(self).items() if value is not None}
        if set(sizes.values()) != {count}:
            raise ValueError(f"got a reward batch with {sizes}; expected one entry per sample in every field")

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, which: Sequence[int] | Tensor) -> RewardBatch:
        """The samples of an index (order kept, repeats allowed) or of a boolean mask [N]."""
        index = torch.as_tensor(which)
        rows = (index.nonzero().flatten() if index.dtype == torch.bool else index.long()).tolist()
        return RewardBatch(
            prompts=[self.prompts[i] for i in rows],
            images=None if self.images is None else self.images[rows],
            metadata=[self.metadata[i] for i in rows],
            sample_ids=[self.sample_ids[i] for i in rows],
            group_ids=[self.group_ids[i] for i in rows],
        )

    def pixels(self) -> Tensor:
        """images as uint8 [N, 3, H, W] on the CPU, round(255 x) as flow_grpo does (half to even; not truncated).

        ValueError without images, or if a value lies more than 1e-3 outside [0, 1] (a model's [-1, 1], say).
        """
        if self.images is None:
            raise ValueError("got a batch without images; expected images, which this reward needs")
        images = self.images.detach()
        if images.numel() and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"got images in {low:.3g}..{high:.3g}; expected [0, 1]: rescale what the decoder returns")
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@dataclass(frozen=True, eq=False)
class RewardOutput:
    """Scores of N samples.

    scores float32 [N]; valid bool [N]; components: raw parts by name, float32 [N]; info: for humans, per sample, what was
    seen or why there is no score (an empty list for none); elapsed: seconds for the batch, measured by `score`.
    """

    scores: Tensor
    valid: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    info: list[str] = field(default_factory=list)
    elapsed: float = 0.0


class Reward(Protocol):
    """A reward. Construction is cheap and a sample's score does not depend on its batch mates. Callers ask through `score`."""

    @property
    def name(self) -> str:
        """Names the reward in metrics and messages; not empty."""
        ...

    def __call__(self, batch: RewardBatch) -> RewardOutput: ...

    def load(self) -> None:
        """Loads models and starts workers; the first call does it too."""
        ...

    def close(self) -> None:
        """Frees what `load` made; may be called again, and before `load`."""
        ...


def _unit_float(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"got images {list(images.shape)}; expected [N, 3, H, W]")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"got images of {images.dtype}; expected floats in [0, 1] or uint8")
    return images.float()
