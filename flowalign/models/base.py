"""The contracts: what training asks of a Policy, and what a family's Model must offer to become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import Parameter

import samplers
from flowalign.models.roles import Role


@dataclass(frozen=True, eq=False)
class Conditions:
    """Encoded prompts: tensors [P, ...] with one row per prompt, by name."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> Conditions:
        """The rows `index` [n], in that order, repeats allowed."""
        return Conditions({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """All rows of all parts."""
        return Conditions({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Policy(Protocol):
    """A pipeline's parts in the convention of `samplers`: velocities, σ from 1 to 0, fp32 states.

    `evaluations` counts network rows: one per state, two under guidance; checkpoint recomputation does not count."""

    evaluations: int

    @property
    def path(self) -> samplers.Path:
        """The noising law to which `sigmas` and `velocity` refer; kernels are bound to it by `Kernel.bind(path)`."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent for an image of height × width pixels; ValueError if the size does not divide."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt. Each distinct text goes through the encoders once per run."""
        ...

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        """[T+1] fp32 on the CPU, as the pipeline's own scheduler has them for latents of this shape."""
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
        """Images [n, 3, H, W] fp32 in [0, 1]."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """The trained networks by name."""
        ...

    def networks(self) -> list[nn.Module]:
        """All networks that `velocity` may call: the trained ones, and the copies that roles keep when full weights are
        trained."""
        ...

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        """The tensors that the policy's optimizer steps, by name, in a fixed order."""
        ...

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        """Adds roles, each starting as a copy of the policy's weights; ValueError for a name that is taken."""
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

    def pipeline_setup(self) -> list[str]:
        """Lines of Python that make a freshly loaded `pipe` sample as this policy's deterministic rollout does."""
        ...

    def pipeline_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's own call, beyond prompt, steps, guidance and size, that this policy implies."""
        ...

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        """(setup lines, arguments) beside those, with which the pipeline steps over exactly these levels [T+1], not over
        its scheduler's own. ValueError for a scheduler that takes none."""
        ...


class Model(Protocol):
    """What differs between families: one diffusers pipeline in the convention of `samplers`. Roles, guidance, the store of
    encoded prompts and training are not its business: `PipelinePolicy` adds them for every family alike.

    network: the trained network; `predict` may be called with a copy of it."""

    network: ModelMixin

    @property
    def path(self) -> samplers.Path:
        """See Policy."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """See Policy."""
        ...

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        """See Policy."""
        ...

    def encode(self, prompts: list[str]) -> Conditions:
        """One row per prompt."""
        ...

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The prediction of `network` (ε, v or velocity) at fp32 states x [n, *] with noise levels sigma [n]; guidance
        combines such predictions linearly."""
        ...

    def to_velocity(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """v [n, *] from the network's prediction [n, *], both fp32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, H, W] in [-1, 1]."""
        ...

    def save_lora(self, folder: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """pytorch_lora_weights.safetensors as the pipeline's `load_lora_weights` reads it."""
        ...

    def pipeline_setup(self) -> list[str]:
        """See Policy."""
        ...

    def pipeline_arguments(self) -> dict[str, Any]:
        """See Policy; without the negative prompt."""
        ...

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        """See Policy."""
        ...


@dataclass(frozen=True, eq=False)
class Family:
    """What must be known of a model family before its weights are read.

    model: makes the Model from the loaded pipeline and `max_sequence_length`. part: name of the trained component;
    network: its diffusers class; targets: its LoRA targets by default. path: the noising law from the scheduler's
    configuration (with "_class_name"), ValueError for a scheduler whose steps the rollout cannot repeat. unit: height and
    width must be multiples of it; from the network's configuration and the VAE's reduction. load_arguments: extra
    arguments of `from_pretrained`, from model_index.json."""

    model: Callable[[Any, int | None], Model]
    part: str
    network: Any
    targets: tuple[str, ...]
    path: Callable[[dict[str, Any]], samplers.Path]
    unit: Callable[[dict[str, Any], int], int]
    load_arguments: Callable[[dict[str, Any]], dict[str, Any]]


def check_size(height: int, width: int, unit: int) -> None:
    """ValueError unless both are positive multiples of `unit`."""
    if min(height, width) < unit or height % unit or width % unit:
        raise ValueError(
            f"got image size {height}×{width}; expected positive multiples of {unit} for this model: change policy.height "
            "and policy.width"
        )


def encode_singly(policy: Policy, prompts: Sequence[str]) -> Conditions:
    """One row per prompt, each text encoded alone.

    In a batch the rounding of an embedding depends on the other texts. A resumed run encodes its prompts again, and a text
    may then be in another batch than the first time."""
    return Conditions.cat([policy.encode([text]) for text in prompts])
