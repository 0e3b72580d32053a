"""The contract of a reward: a batch of samples in, scores out.

A sample that cannot be scored is NaN with valid False; a reward that cannot score at all is a RewardError.
Neither ever becomes 0, -1 or a mid-score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

Input = Literal["images", "videos", "latents", "conditions"]
Scope = Literal["terminal", "completion", "latent"]
Memory = Literal["cpu", "S", "M", "L", "XL"]


class RewardError(RuntimeError):
    """A reward could not score a batch; the message names the reward."""


@dataclass(frozen=True)
class RewardSpec:
    """What a reward reads and what it gives. ValueError for fields that contradict each other.

    inputs: what a batch must have for it; () reads prompts and metadata only. "conditions": it compares with source images.
    scope: what it scores. "terminal": finished samples (their latents, if it reads them, have sigma 0). The other two are
      process rewards, of the states x_sigma of a rollout. "latent": the noisy state itself; "completion": what deterministic
      steps make of it.
    channels: names of the columns of its scores; () is one column, named like the reward.
    differentiable: whether gradients reach its inputs (`score(..., grad=True)`).
    range: smallest and largest score of every channel; a score outside is a RewardError. None: not known.
    licence: of code and weights, for humans. checkpoint: the weights it loads, hub id or path.
    memory: what its weights take on a GPU: "cpu" nothing, "S" less than 2 GB, "M" 2 to 8, "L" 8 to 20, "XL" more, or a server.
    scores_black: False if an image without content has no score, since a face, say, must be found first; the trial before a
      run then accepts that.
    groupwise: a score compares a sample with the others of its group (equal group_ids), so the reward gets whole groups.
    elsewhere: another process computes it, and a call changes nothing in this one: it may run in a thread beside the rollout.
    completion_steps, max_sigma: of scope "completion" only. How many steps: 1 is the x0-prediction, None all that are left.
      States noisier than max_sigma are not scored."""

    inputs: tuple[Input, ...] = ("images",)
    scope: Scope = "terminal"
    channels: tuple[str, ...] = ()
    differentiable: bool = False
    range: tuple[float, float] | None = None
    licence: str = ""
    scores_black: bool = True
    checkpoint: str = ""
    memory: Memory = "cpu"
    groupwise: bool = False
    elsewhere: bool = False
    completion_steps: int | None = 1
    max_sigma: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.inputs)) < len(self.inputs) or not set(self.inputs) <= set(get_args(Input)):
            raise ValueError(f"got inputs {self.inputs}; expected some of {get_args(Input)}, each once")
        if self.scope not in get_args(Scope):
            raise ValueError(f"got scope {self.scope!r}; expected one of {get_args(Scope)}")
        if self.memory not in get_args(Memory):
            raise ValueError(f"got memory {self.memory!r}; expected one of {get_args(Memory)}")
        if self.scope == "latent" and self.inputs != ("latents",):
            raise ValueError(
                f"got scope 'latent' with inputs {self.inputs}; expected ('latents',): states are not decoded"
            )
        if self.groupwise and self.scope != "terminal":
            raise ValueError(f"got groupwise with scope {self.scope!r}; expected 'terminal': states are scored alone")
        if self.scope != "completion" and (self.completion_steps, self.max_sigma) != (1, 1.0):
            raise ValueError(f"got completion_steps or max_sigma with scope {self.scope!r}; expected 'completion'")
        if not 0 < self.max_sigma <= 1 or (self.completion_steps is not None and self.completion_steps < 1):
            raise ValueError(
                f"got completion_steps={self.completion_steps}, max_sigma={self.max_sigma}; expected at least 1 (or None), and a "
                "noise level in (0, 1]"
            )
        if len(set(self.channels)) < len(self.channels) or not all(self.channels):
            raise ValueError(f"got channels {self.channels}; expected different names, none of them empty")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"got range {self.range}; expected (smallest, largest), or None if it is not known")


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardBatch:
    """N samples to be scored. Every list has N entries, every tensor N rows.

    images [N, 3, H, W], videos [N, F, 3, H, W]: RGB in [0, 1]; uint8 in 0..255 is converted here, float64 stays, other floats
    become float32. fps: frames per second of the videos, which has to be said.
    latents [N, *]: states in the policy's latent space, with their noise levels sigma [N] in [0, 1] (0 is data).
    conditions: the source images of each sample (editing), a list of [3, H, W] tensors in [0, 1], which may be empty.
    In a run and in its trial all of them lie on the policy's device: move them (`to`) to the reward's own.
    metadata: what the prompt set holds about each prompt (targets, colors, ...). sample_ids: names of the samples in
    messages. group_ids: equal for samples of the same prompt. Both default to 0..N-1, so each sample is its own group.
    ValueError or TypeError for fields of unequal length, for prompts that are no list of texts, for tensors of another shape or
    dtype, for videos without fps and latents without sigma. Images of several sizes make several batches.
    """

    prompts: list[str]
    images: Tensor | None = None
    videos: Tensor | None = None
    fps: float | None = None
    latents: Tensor | None = None
    sigma: Tensor | None = None
    conditions: list[list[Tensor]] | None = None
    metadata: list[dict[str, Any]] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    group_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, list) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise TypeError(
                f"got prompts of type {type(self.prompts).__name__}; expected a list of texts, one per sample"
            )
        count = len(self.prompts)
        fill = {
            "metadata": self.metadata or [{} for _ in range(count)],
            "sample_ids": self.sample_ids or list(range(count)),
            "group_ids": self.group_ids or list(range(count)),
            "images": None if self.images is None else _unit_float(self.images, "images [N, 3, H, W]"),
            "videos": None if self.videos is None else _unit_float(self.videos, "videos [N, F, 3, H, W]"),
            "conditions": None if self.conditions is None else [
                [_unit_float(image, "conditions of [3, H, W] each") for image in images] for images in self.conditions
            ],
        }  # fmt: skip
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        sizes = {name: len(value) for name, value in vars(self).items() if value is not None and name != "fps"}
        if set(sizes.values()) != {count}:
            raise ValueError(f"got a reward batch with {sizes}; expected one entry per sample in every field")
        if (self.videos is None) != (self.fps is None) or (self.fps is not None and not 0 < self.fps < math.inf):
            has = "no videos" if self.videos is None else "videos"
            raise ValueError(f"got {has} with fps={self.fps}; expected fps above 0 with videos, and only with them")
        _check_latents(self.latents, self.sigma)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, which: Sequence[int] | Tensor) -> RewardBatch:
        """The samples of an index (order kept, repeats allowed) or of a boolean mask [N]."""
        index = torch.as_tensor(which)
        rows = (index.nonzero().flatten() if index.dtype == torch.bool else index.long()).tolist()
        return RewardBatch(
            prompts=[self.prompts[i] for i in rows],
            **{name: None if tensor is None else tensor[rows] for name, tensor in self.tensors().items()},
            fps=self.fps,
            conditions=None if self.conditions is None else [self.conditions[i] for i in rows],
            metadata=[self.metadata[i] for i in rows],
            sample_ids=[self.sample_ids[i] for i in rows],
            group_ids=[self.group_ids[i] for i in rows],
        )

    def tensors(self) -> dict[str, Any]:
        """The fields with one row per sample, by name: images, videos, latents, sigma."""
        return {"images": self.images, "videos": self.videos, "latents": self.latents, "sigma": self.sigma}

    def to(self, device: torch.device | str) -> RewardBatch:
        """The same samples on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items() if tensor is not None}
        conditions = self.conditions and [[image.to(device) for image in images] for images in self.conditions]
        return replace(self, **moved, conditions=conditions)

    def unit_images(self) -> Tensor:
        """images as they are, with their graph.

        ValueError without images, or if a value lies more than 1e-3 outside [0, 1] (a model's [-1, 1], say).
        """
        if self.images is None:
            raise ValueError("got a batch without images; expected images, which this reward needs")
        images = self.images.detach()
        if images.numel() and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"got images in {low:.3g}..{high:.3g}; expected [0, 1]: rescale what the decoder returns")
        return self.images

    def pixels(self) -> Tensor:
        """images as uint8 [N, 3, H, W] on the CPU, round(255 x) as flow_grpo does (half to even; not truncated).

        ValueError as in `unit_images`.
        """
        return (self.unit_images().detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@dataclass(frozen=True, eq=False)
class RewardOutput:
    """Scores of N samples.

    A reward of one channel answers with scores float32 [N] and valid bool [N], one of several with [N, C] each, a column per
    channel of its spec. `score` always returns [N, C] and the names in `channels` (the reward leaves that empty).
    components: raw parts by name, float32 [N], which are logged and not trained on. info: for humans, per sample, what was
    seen or why there is no score (an empty list for none). elapsed: seconds for the batch, measured by `score`.
    uncertainty: how far each score may be off, in the units of the score, >= 0, of the shape of `scores`; None if the
    reward does not know.
    """

    scores: Tensor
    valid: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    info: list[str] = field(default_factory=list)
    elapsed: float = 0.0
    uncertainty: Tensor | None = None
    channels: tuple[str, ...] = ()


class Reward(Protocol):
    """A reward. Construction is cheap; a sample's score does not depend on its batch mates (if groupwise: on those of other
    groups). Callers ask through `score`. It is a key of a dict and equals only itself: a dataclass says `eq=False`."""

    @property
    def name(self) -> str:
        """Names the reward in metrics and messages; not empty."""
        ...

    @property
    def spec(self) -> RewardSpec:
        """What it reads and gives; known before `load`. In a class of your own: `spec = RewardSpec()`."""
        ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        """Gradients are on if the caller of `score` wants them."""
        ...

    def load(self) -> None:
        """Loads models and starts workers; the first call does it too."""
        ...

    def close(self) -> None:
        """Frees what `load` made; may be called again, and before `load`."""
        ...


def spec_of(reward: Reward) -> RewardSpec:
    """Its spec; ValueError for a class that was written without one."""
    try:
        spec = reward.spec
    except AttributeError as error:
        raise ValueError(
            f"got {type(reward).__name__}, a reward without `spec` ({error}); expected a rewards.RewardSpec: write "
            "`spec = RewardSpec()` in the class, with what it reads if that is not images"
        ) from error
    if not isinstance(spec, RewardSpec):
        raise ValueError(f"got {type(reward).__name__}.spec={spec!r}; expected a rewards.RewardSpec")
    return spec


def channels_of(reward: Reward) -> tuple[str, ...]:
    """The names of the columns of its scores."""
    return spec_of(reward).channels or (reward.name,)


def labels_of(reward: Reward) -> tuple[str, ...]:
    """Those names beside the channels of other rewards: the reward's own if it has one channel, else `reward/channel`."""
    channels = spec_of(reward).channels
    return (reward.name,) if len(channels) < 2 else tuple(f"{reward.name}/{channel}" for channel in channels)


def pictures(pixels: Tensor, fps: float | None) -> dict[str, Any]:
    """What a policy decoded as fields of a RewardBatch: images from [n, 3, H, W], videos from [n, F, 3, H, W].

    ValueError for videos without fps."""
    if pixels.ndim == 4:
        return {"images": pixels}
    if fps is None:
        raise ValueError("got videos without frames per second; expected fps (policy.fps in a configuration)")
    return {"videos": pixels, "fps": fps}


def _unit_float(pixels: Tensor, expected: str) -> Tensor:
    """`pixels` as floats; expected: their name and shape, "images [N, 3, H, W]"."""
    name, _, shape = expected.partition(" ")
    if not isinstance(pixels, Tensor):
        raise TypeError(f"got {name} of type {type(pixels).__name__}; expected a tensor {shape}: one batch per size")
    if pixels.ndim != shape.count(",") + 1 or pixels.shape[-3] != 3:
        raise ValueError(f"got {name} {list(pixels.shape)}; expected {shape}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise TypeError(f"got {name} of {pixels.dtype}; expected floats in [0, 1] or uint8")
    return pixels if pixels.dtype == torch.float64 else pixels.float()


def _check_latents(latents: Tensor | None, sigma: Tensor | None) -> None:
    if (latents is None) != (sigma is None):
        has, lacks = ("sigma", "latents") if latents is None else ("latents", "sigma")
        raise ValueError(f"got {has} without {lacks}; expected both, or neither: sigma 0 means latents without noise")
    if latents is None or sigma is None:
        return
    if latents.ndim < 2 or not latents.is_floating_point():
        raise ValueError(f"got latents {latents.dtype} {list(latents.shape)}; expected floats [N, *]")
    if sigma.ndim != 1 or not sigma.is_floating_point():
        raise ValueError(f"got sigma {sigma.dtype} {list(sigma.shape)}; expected floats [N], a noise level per sample")
    if len(sigma) and not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError(
            f"got sigma from {float(sigma.min()):g} to {float(sigma.max()):g}; expected 0 (data) to 1 (noise)"
        )
