"""The contracts: what training asks of a Policy, and what a family's Model must offer to become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter

import samplers
from flowalign.data import PromptRecord
from flowalign.models.conditions import Conditions
from flowalign.models.images import Images
from flowalign.models.roles import Role
from samplers import Schedule


@dataclass(frozen=True)
class Size:
    """What is generated: `frames` images of height × width pixels; one frame is an image. One policy run has one size, so the
    latents of a forest have one shape."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Sampling:
    """How a policy generates by its solver. schedule: the noise levels; None: the family's own grid. fps: frames per second of a
    policy that makes videos. ValueError for numbers that cannot be."""

    num_inference_steps: int
    guidance_scale: float
    size: Size
    schedule: Schedule | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1 or not 1 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"got num_inference_steps={self.num_inference_steps}, guidance_scale={self.guidance_scale}; expected at least 1 "
                "step and a scale from 1 (no guidance)"
            )


class Policy(Protocol):
    """A pipeline's parts in the convention of `samplers`: velocities, σ from 1 to 0, fp32 states.

    `evaluations` counts network rows, `rows_per_state` of them per state; checkpoint recomputation does not count, and
    rows that only fill up a call are counted by `padded` alone.
    `sampling`: how it generates where a call does not say; None: every call has to."""

    evaluations: int
    padded: int
    sampling: Sampling | None

    @property
    def path(self) -> samplers.Path:
        """The noising law to which `sigmas` and `velocity` refer; kernels are bound to it by `Kernel.bind(path)`."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent; ValueError for a size that the model cannot make."""
        ...

    def encode(
        self,
        records: Sequence[PromptRecord],
        *,
        negative: bool = False,
        together: bool = False,
        size: Size | None = None,
    ) -> Conditions:
        """One row per record, from its prompt and images. Each record is encoded alone, so its row does not depend on the
        others, and is kept for the next time.

        size: of what is generated from them, which source images are fitted to; None: that of `sampling`.

        negative: also the rows that guidance starts from, of the record's own negative prompt or the policy's, with the
        record's images; needed by `velocity` where `rows_per_state` is more than 1. together: in one batch, as a pipeline's
        call encodes, and not kept; the rounding then depends on the batch."""
        ...

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        """[T+1] fp32 on the CPU, as the pipeline's own scheduler has them for latents of this shape."""
        ...

    def solver(self) -> samplers.Kernel:
        """The deterministic step of the pipeline's own scheduler, bound to `path`: for evaluation and parity."""
        ...

    def rows_per_state(self, guidance_scale: float) -> int:
        """Network rows per state: 2 for classifier-free guidance, 1 without or where the scale is an input of the network."""
        ...

    def start(self, noise: Tensor) -> Tensor:
        """The states at the first σ, from unit noise."""
        ...

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        """v [n, *] fp32 at states x [n, *] with noise levels sigma [n], one condition row per state.

        detach_uncond: no gradient through the unconditional half of a guided velocity."""
        ...

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        """Images [n, 3, H, W], or videos [n, F, 3, H, W], fp32 in [0, 1].

        grad: with a gradient to the latents, which passes the clamp to [0, 1] as if it were not there: a pixel beyond the
        range would have none otherwise."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [n, *latent_shape] fp32 of images [n, 3, H, W], or videos [n, F, 3, H, W], in [0, 1], where `decode` leads
        back: the mean that the VAE gives, without its noise. No gradient. ValueError for another shape or range, and for a size
        that the model cannot make."""
        ...

    def generate(
        self, prompts: str | Sequence[str | PromptRecord], *, seed: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, size: Size | None = None, schedule: Schedule | None = None,
        batch_size: int = 8, noise: Tensor | None = None,
    ) -> Images:  # fmt: skip
        """One image, or video, per prompt, by the solver.

        What is None is as `sampling` says. The start noise is a function of the seed and the prompt's uid (its place in a list
        of texts), and the same as that of `flowalign.evaluation.evaluate`. noise: [N, *latent_shape] in its place, normal with
        unit variance, such as an optimized one; the seed is then unused."""
        ...

    def checkpointed(self) -> AbstractContextManager[None]:
        """A context in which the blocks of networks and decoder store no activations: their backward computes them again."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """The trained networks by their names in the pipeline; one, or several such as the two of Wan 2.2."""
        ...

    def networks(self) -> list[nn.Module]:
        """All networks that `velocity` may call: the trained ones, and the copies that roles keep when full weights are
        trained."""
        ...

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """The tensors that the policy's optimizer steps, by name, in a fixed order. With several networks a name begins with
        the network's."""
        ...

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        """Adds roles; each starts as its `init` says. ValueError for a name that is taken, or roles that cannot be."""
        ...

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        """The weights of "policy" or of an added role, by name, in the policy's order; names differ between roles."""
        ...

    def follow(self, step: int) -> None:
        """Updates the roles that follow the policy, after its `step`-th optimizer step (1 is the first)."""
        ...

    def role(self, name: str) -> AbstractContextManager[None]:
        """A context in which `velocity` uses the weights of a role: "policy" (trained), "reference" (the model without
        training) or an added one. Restored also after an exception; never touches requires_grad."""
        ...

    def save_lora(self, folder: Path) -> None:
        """Writes the adapter for diffusers and for PEFT; ValueError if the policy has none."""
        ...

    def save_networks(self, folder: Path, write: bool = True) -> None:
        """Writes each network as a folder of diffusers (`from_pretrained`), named after its part of the pipeline; ValueError
        for a policy with a LoRA, whose networks are not trained. Collective where they are sharded: one process writes."""
        ...

    def pipeline_setup(self) -> list[str]:
        """Lines of Python that make a freshly loaded `pipe` sample as this policy's deterministic rollout does."""
        ...

    def pipeline_arguments(self, guidance_scale: float, size: Size) -> dict[str, Any]:
        """Arguments of the pipeline's own call, as JSON: all but prompts, source images and steps, under the names that this
        pipeline has for size, guidance and negative prompt."""
        ...

    def pipeline_inputs(self, records: Sequence[PromptRecord], guidance_scale: float, size: Size) -> dict[str, Any]:
        """Arguments of the pipeline's own call that say the prompts, the negative prompts that guidance needs, and the source
        images of these records, fitted to `size` as `encode` fits them."""
        ...

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents [n, *latent_shape] as the pipeline's call takes them, packed say."""
        ...

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        """The way back: [n, *latent_shape] from the latents that the pipeline's call holds after a step, for this size."""
        ...

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        """(setup lines, arguments) beside those, with which the pipeline steps over exactly these levels [T+1], not over
        its scheduler's own. ValueError for a scheduler that takes none."""
        ...


# a network as `Model.velocity` gets it: called with the arguments of its `forward`, by position or by name
Network = Callable[..., Any]


class Model(Protocol):
    """What differs between families: one diffusers pipeline in the convention of `samplers`. Roles, the store of encoded
    prompts and training are not its business: `PipelinePolicy` adds them for every family alike."""

    @property
    def networks(self) -> Mapping[str, ModelMixin]:
        """The trained networks by their names in the pipeline."""
        ...

    @property
    def vae(self) -> ModelMixin:
        """What decodes."""
        ...

    @property
    def encoders(self) -> Sequence[nn.Module]:
        """What `encode` runs."""
        ...

    @property
    def path(self) -> samplers.Path:
        """See Policy."""
        ...

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        """See Policy."""
        ...

    def solver(self) -> samplers.Kernel:
        """See Policy; not bound to a path."""
        ...

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        """One row per record, from its `prompt` and `images` alone, on the encoders' device, which is where they are now. All
        rows that there can be have one shape for one size of what is generated, whatever the prompt's length.

        negative: the prompts are those that guidance starts from, which some pipelines encode in another way."""
        ...

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        """v [n, *] fp32 at fp32 states x [n, *] with noise levels sigma [n], under the family's own guidance rule;
        conditions, negative: one row per state. With several networks sigma is left where the caller has it.

        networks: what to call in place of `self.networks`: the same or those of a role, and every call is counted by the
        length of its first argument. negative: None if it was not encoded; ValueError then if the guidance needs it.
        detach_uncond: no gradient through the unconditional half."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, H, W], or videos [n, F, 3, H, W], in [-1, 1], or beyond; in the dtype of the VAE."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [n, *] of images [n, 3, H, W], or videos [n, F, 3, H, W], in [-1, 1]: the mean of the VAE's posterior, shifted and scaled as `decode`
        undoes it; in the dtype of the VAE."""
        ...

    def pipeline_setup(self) -> list[str]:
        """See Policy."""
        ...

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        """See Policy. negative_prompt: where a record has none of its own."""
        ...

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        """See Policy. negatives: the same records with their negative prompts as `prompt`; None: none are needed."""
        ...

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """See Policy."""
        ...

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        """See Policy."""
        ...

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        """See Policy."""
        ...


# component of the pipeline -> its configuration: the trained networks and "vae"
Configs = Mapping[str, Mapping[str, Any]]


# what the guidance scale is: the weight of a second row, an input of the network, or nothing
Guidance = Literal["classifier_free", "embedded", "none"]


@dataclass(frozen=True)
class Distilled:
    """What a checkpoint's configuration says of its distillation. steps: the most that it was distilled for; None: it says nothing of
    few steps. ignores_guidance: whether it has no input for the guidance scale and no second row."""

    steps: int | None = None
    ignores_guidance: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """What must be known of a model family before its weights are read.

    pipeline: the pipeline's class, named in model_index.json. model: makes the Model, `model(pipeline, **options)`, where the
    options are `policy.options` and, if it is given, `max_sequence_length`; those that it takes are the arguments in its signature.
    networks: name of each trained component -> its diffusers class; one that a checkpoint lacks (null in model_index.json) is left
    out. targets: LoRA targets by default.
    path: the noising law from the scheduler's configuration (with "_class_name"), ValueError for a scheduler whose steps the
    rollout cannot repeat. latent_shape: of one latent, from the components' configurations; ValueError for a size that the
    model cannot make. rows_per_state: see Policy. source_images: the least and the most of them that a record may have.
    distilled: see there; from the components' configurations, the scheduler's too (with "_class_name").
    own_fit: whether the pipeline fits source images itself, each in its own aspect ratio; if not, they are fitted to what is generated.
    negative_prompts: whether the pipeline's call takes a negative prompt; if not, guidance starts from "".
    load_arguments: extra arguments of `from_pretrained`, from model_index.json. load_lora: Python that loads what `Policy.save_lora` wrote
    into a folder, given as Python, into `pipe`. variant: fields of this which a checkpoint's model_index.json changes, such as the rows of a
    distilled one. takes_levels: whether the call of a pipeline of flows can step over levels that are not its scheduler's own (see
    `Model.pipeline_sigmas`). tiny: very small pipelines of the family for tests, by name: component -> (class, configuration), or
    another argument of the pipeline; the scheduler is the released one. See `flowalign.testing.tiny_pipeline`."""

    pipeline: Any
    model: Callable[..., Model]
    networks: Mapping[str, Any]
    targets: tuple[str, ...]
    path: Callable[[dict[str, Any]], samplers.Path]
    latent_shape: Callable[[Size, Configs], tuple[int, ...]]
    rows_per_state: Callable[[float], int]
    source_images: tuple[int, int] = (0, 0)
    own_fit: bool = False
    distilled: Callable[[Configs], Distilled] = lambda configs: Distilled()
    negative_prompts: bool = True
    load_arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda index: {}
    load_lora: Callable[[str], list[str]] = lambda folder: [f"pipe.load_lora_weights({folder})"]
    variant: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda index: {}
    takes_levels: bool = True
    tiny: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, index: Mapping[str, Any]) -> Family:
        """As it is for a checkpoint with this model_index.json, or a live pipeline with this configuration."""
        there = {name for name in self.networks if name not in index or index[name][0] is not None}
        networks = {name: kind for name, kind in self.networks.items() if name in there}
        return replace(self, **{"networks": networks, **self.variant(index)})


def check_source_images(records: Sequence[PromptRecord], family: Family) -> None:
    """ValueError for a prompt with fewer or more source images than the model reads; those of a model of text alone would not
    be seen."""
    least, most = family.source_images
    for record in records:
        if not least <= len(record.images) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(
                f"got the prompt {record.prompt!r} with {len(record.images)} source images for a {family.pipeline.__name__}; expected {wanted}: "
                "give them under 'image' or 'images' in the prompt file, or take a model that reads as many"
            )


def check_negative_prompts(prompts: Iterable[str | None], family: Family) -> None:
    """ValueError for a negative prompt with a text where the pipeline takes none; None and "" say nothing."""
    given = [prompt for prompt in prompts if prompt]
    if given and not family.negative_prompts:
        raise ValueError(
            f"got the negative prompt {given[0]!r} for a {family.pipeline.__name__}, whose call takes none; expected none: leave "
            "policy.negative_prompt and those of the prompt files out"
        )


def check_image(size: Size, unit: int) -> None:
    """ValueError unless `size` is one image whose height and width are positive multiples of `unit`."""
    if min(size.height, size.width) < unit or size.height % unit or size.width % unit:
        raise ValueError(
            f"got image size {size.height}×{size.width}; expected positive multiples of {unit} for this model: change "
            "policy.height and policy.width"
        )
    if size.frames != 1:
        raise ValueError(f"got {size.frames} frames for a model of images; expected 1: leave policy.frames out")


def vae_reduction(config: Mapping[str, Any]) -> int:
    """Pixels per latent in each direction, of an AutoencoderKL's configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def check_video(size: Size, unit: int, frame_unit: int) -> None:
    """ValueError unless height and width are positive multiples of `unit`, and the frames 1 or 1 more than a multiple of
    `frame_unit`."""
    check_image(Size(size.height, size.width), unit)
    if size.frames < 1 or (size.frames - 1) % frame_unit:
        raise ValueError(
            f"got {size.frames} frames; expected 1 more than a multiple of {frame_unit} for this model, such as {4 * frame_unit + 1}: change "
            "policy.frames"
        )


def prompts_and_negatives(records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None) -> dict[str, Any]:
    """`Model.pipeline_inputs` of a pipeline that takes `prompt` and `negative_prompt` and no images."""
    own = {"prompt": [record.prompt for record in records]}
    return own if negatives is None else own | {"negative_prompt": [record.prompt for record in negatives]}
