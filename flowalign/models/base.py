"""The contracts: what training asks of a Policy, and what a family's Model must offer to become one. What is known of a family before
its weights are read is in `family.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter

import samplers
from flowalign.data import PromptRecord, Sources
from flowalign.media import Size
from flowalign.models.conditions import Conditions
from flowalign.models.images import Images
from flowalign.models.roles import Role
from samplers import Schedule


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
        batch_size: int = 8, noise: Tensor | None = None, image: Sources | None = None,
    ) -> Images:  # fmt: skip
        """One image, or video, per prompt, by the solver.

        What is None is as `sampling` says. The start noise is a function of the seed and the prompt's uid (its place in a list
        of texts), and the same as that of `flowalign.evaluation.evaluate`. noise: [N, *latent_shape] in its place, normal with
        unit variance, such as an optimized one; the seed is then unused. image: source images of an edit, see
        `flowalign.data.with_images`."""
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
