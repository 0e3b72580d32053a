"""A family's model as a policy: encoded prompts, guidance, roles and adapters, the same for every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

import samplers
from flowalign.data import PromptRecord, Sources, as_records
from flowalign.models.base import Model, Network, Sampling, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Family, check_negative_prompts, check_source_images
from flowalign.models.images import Images
from flowalign.models.lora import ADAPTER, adapter_state, save_peft
from flowalign.models.lora_bytes import order_header, ordered
from flowalign.models.prompt_store import PromptStore
from flowalign.models.roles import Role
from flowalign.models.sampling import in_batches, settle
from flowalign.models.switches import Switches, graphs_counted
from flowalign.models.trained_networks import TrainedNetworks, recomputed
from flowalign.models.vae_tiles import tiled
from flowalign.storage.sharded import whole
from samplers import Schedule

Offloadable = Literal["encoders", "vae"]
DECODE_BATCH = 4  # a decoder's activations are large: 64 images of 512² take 24 GiB
PROMPT_STORE_BYTES = 2 * 2**30  # 500 prompts of 512 tokens of T5-XXL in bf16; those of CLIP all fit
# most pipelines decode latents of the network's dtype as they are, which a VAE of another dtype refuses
CAST = (
    "pipe.vae.decode = lambda x, decode=pipe.vae.decode, **more: decode(x.to(pipe.vae.dtype), **more)  # its own dtype"
)


class PipelinePolicy:
    """The policy of a model. Satisfies `flowalign.models.base.Policy`, which documents what is not documented here.

    device: where conditions go, and parts that are offloaded while they work. offload: parts that are on the CPU while they do
    not work (of a VAE that has decoded with a gradient, until it decodes again: its backward comes later). decode_batch:
    latents or images per call of the VAE; None is all at once on the CPU, 4 elsewhere. vae_tiling: the VAE takes what is larger than
    its tiles in overlapping ones, each alone; the result differs from that without tiles. prompt_store: bytes of encoded prompts that
    are kept, on the CPU. autocast: what the networks multiply in, of weights that stay fp32; None: in the dtype of their weights.
    switches: of the networks; gradient_checkpointing also of the VAE, if diffusers can. fixed_rows: states of every network
    call: more are split, fewer padded; None: as many as there are."""

    def __init__(
        self, model: Model, family: Family, trained: TrainedNetworks, *, negative_prompt: str = "",
        device: str | torch.device = "cpu", offload: Sequence[Offloadable] = (), decode_batch: int | None = None,
        prompt_store: int = PROMPT_STORE_BYTES, sampling: Sampling | None = None, autocast: torch.dtype | None = None,
        switches: Switches | None = None, fixed_rows: int | None = None, vae_tiling: bool = False,
    ) -> None:  # fmt: skip
        check_negative_prompts([negative_prompt], family)
        self.model = model
        self.negative_prompt = negative_prompt
        self.evaluations = self.padded = 0
        self.sampling = sampling
        self._family = family
        self._trained = trained
        self._device = torch.device(device)
        self._offload = {name: list(_parts(model, name)) for name in offload}
        self._autocast = autocast
        self._devices: tuple[torch.device, torch.device] | None = None  # of the first weight, of the network
        self._decode_batch = decode_batch
        self._prompts = PromptStore(lambda record, *how: model.encode([record], *how), prompt_store)
        self._vae_tiling = vae_tiling
        self._switches = switches or Switches()
        self._fixed_rows = fixed_rows
        self._recomputed = recomputed(trained)
        self._switch()
        for part in (part for parts in self._offload.values() for part in parts):
            part.to("cpu")

    # ------------------------------------------------------------------------------------------ sampling

    @property
    def path(self) -> samplers.Path:
        return self.model.path

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        parts = {**self.model.networks, "vae": self.model.vae}
        return self._family.latent_shape(size, {name: part.config for name, part in parts.items()})

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        return self.model.sigmas(num_inference_steps, latent_shape)

    def solver(self) -> samplers.Kernel:
        return self.model.solver().bind(self.path)

    def rows_per_state(self, guidance_scale: float) -> int:
        return self._family.rows_per_state(guidance_scale)

    def start(self, noise: Tensor) -> Tensor:
        return samplers.send(self._network_device, noise)[0].to(self._network_device, torch.float32)

    @property
    def encoded(self) -> int:
        """How many records went through the encoders to be kept; one that was dropped and comes again counts again."""
        return self._prompts.encoded

    @torch.no_grad()
    def encode(
        self,
        records: Sequence[PromptRecord],
        *,
        negative: bool = False,
        together: bool = False,
        size: Size | None = None,
    ) -> Conditions:
        check_source_images(records, self._family)
        check_negative_prompts([record.negative_prompt for record in records], self._family)
        asked = [(list(records), False)]
        if negative:
            asked.append(([self._negative(record) for record in records], True))
        if size is None and self.sampling is not None:
            size = self.sampling.size
        if together:
            with self._encoding(records):
                parts = [self.model.encode(rows, size, kind).to(self._device) for rows, kind in asked]
        else:
            new = [record for rows, kind in asked for record in self._prompts.missing(rows, size, kind)]
            with self._encoding(new):
                parts = [self._prompts.conditions(rows, size, kind).to(self._device) for rows, kind in asked]
        return Conditions(parts[0].tensors, parts[1] if negative else None)

    @contextmanager
    def _encoding(self, records: Sequence[PromptRecord]) -> Iterator[None]:
        """Inside, what encodes these is at work; source images go through the VAE."""
        with (
            self._at_work("encoders") if records else nullcontext(),
            self._at_work("vae") if any(record.images for record in records) else nullcontext(),
        ):
            yield

    def _negative(self, record: PromptRecord) -> PromptRecord:
        own = record.negative_prompt
        return replace(record, prompt=self.negative_prompt if own is None else own)

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        if (
            len(self.model.networks) > 1
        ):  # a sigma on the host says which of them takes a row without waiting for the device
            x = samplers.send(self._network_device, x)[0]
        else:
            x, sigma = samplers.send(self._network_device, x, sigma)
        x = x.to(self._network_device, torch.float32)
        if self._fixed_rows is None:
            return self._call(x, sigma, conditions, guidance_scale, detach_uncond)
        sigma, found = sigma.to(x.device), []
        for own in torch.arange(len(x), device=x.device).split(self._fixed_rows):
            # the last call repeats its first state, which has no gradient there
            rows, before = torch.cat([own, own[:1].expand(self._fixed_rows - len(own))]), self.evaluations
            v = self._call(x[rows], sigma[rows], conditions.rows(rows), guidance_scale, detach_uncond)
            found.append(v[: len(own)])
            padded = (self.evaluations - before) * (self._fixed_rows - len(own)) // self._fixed_rows
            self.evaluations, self.padded = self.evaluations - padded, self.padded + padded
        return torch.cat(found)

    def _call(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance_scale: float, detach_uncond: bool
    ) -> Tensor:
        networks = {name: self._counted(network) for name, network in self._trained.active.items()}
        own = Conditions(conditions.tensors)
        return self.model.velocity(networks, x, sigma, own, conditions.negative, guidance_scale, detach_uncond)

    def _counted(self, network: nn.Module) -> Network:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.evaluations += len(args[0] if args else next(iter(kwargs.values())))
            with self._casting(), graphs_counted():
                return network(*args, **kwargs)

        return call

    def _casting(self) -> AbstractContextManager[object]:
        """Of one call: autocast keeps a cast weight until its context ends, and the next update changes the weight."""
        return nullcontext() if self._autocast is None else torch.autocast(self._network_device.type, self._autocast)

    def generate(
        self, prompts: str | Sequence[str | PromptRecord], *, seed: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, size: Size | None = None, schedule: Schedule | None = None,
        batch_size: int = 8, noise: Tensor | None = None, image: Sources | None = None,
    ) -> Images:  # fmt: skip
        settings = settle(
            self.sampling, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, size=size,
            schedule=schedule,
        )  # fmt: skip
        records = as_records(prompts, image)
        if not records:
            raise ValueError("got no prompts; expected at least one")
        parts = in_batches(self, [(record, 0) for record in records], settings, seed, batch_size, noise)
        pixels = torch.cat([images.cpu() for _, _, images in parts])
        return Images(pixels, [record.prompt for record in records], settings.fps if pixels.ndim == 5 else None)

    def decode(self, latents: Tensor, grad: bool = False) -> Tensor:
        if grad:
            for part in self._offload.get("vae", ()):
                part.to(self._device)
            image = self._decoded(latents)
            # image - image.detach() is exactly 0: the clamped value, with the gradient of the unclamped one
            return image.detach().clamp(0, 1) + (image - image.detach())
        with torch.no_grad(), self._at_work("vae"):
            return self._decoded(latents).clamp(0, 1)

    def _decoded(self, latents: Tensor) -> Tensor:
        with self._tiles():
            return torch.cat([self.model.decode(part).float() * 0.5 + 0.5 for part in self._slices(latents)])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        if images.ndim not in (4, 5) or images.shape[-3] != 3 or not len(images):
            raise ValueError(
                f"got images of shape {list(images.shape)}; expected [n, 3, H, W], or videos [n, F, 3, H, W], with n >= 1"
            )
        height, width = images.shape[-2:]
        shape = self.latent_shape(Size(height, width, images.shape[1] if images.ndim == 5 else 1))
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= 1):  # also nan
            raise ValueError(f"got pixels in [{low:g}, {high:g}]; expected [0, 1]")
        with self._at_work("vae"), self._tiles():
            parts = [self.model.encode_images(part * 2 - 1).float() for part in self._slices(images.float())]
        latents = torch.cat(parts)
        if latents.shape[1:] != shape:
            raise ValueError(
                f"got latents {list(latents.shape[1:])} of images {list(images.shape[1:])}; expected {list(shape)}: the family's "
                "encode_images and latent_shape must agree"
            )
        return latents

    def _tiles(self) -> AbstractContextManager[None]:
        return tiled(self.model.vae) if self._vae_tiling else nullcontext()

    def _slices(self, rows: Tensor) -> tuple[Tensor, ...]:
        on_cpu = self.model.vae.device.type == "cpu"
        return rows.split(self._decode_batch or (max(1, len(rows)) if on_cpu else DECODE_BATCH))

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        parts = [part for part in (*self.networks(), *self._checkpointed_vae) if not part.is_gradient_checkpointing]
        for part in parts:
            part.enable_gradient_checkpointing(self._recomputed)
        try:
            yield
        finally:
            for part in parts:
                part.disable_gradient_checkpointing()

    @property
    def _network_device(self) -> torch.device:
        """Where the networks compute. Asking diffusers walks over all modules (milliseconds), so that is done once, and again when
        the first weight has moved: a live pipeline by its user, a sharded network by FSDP2. Not noticed: diffusers' group
        offloading, switched on later, of a network that is on the CPU already."""
        network = next(iter(self.model.networks.values()))
        place = next(network.parameters()).device
        if self._devices is None or self._devices[0] != place:
            self._devices = place, network.device
        return self._devices[1]

    @contextmanager
    def _at_work(self, name: Offloadable) -> Iterator[None]:
        """Inside, the parts are on the device, if they are offloaded otherwise."""
        parts = self._offload.get(name, ())
        for part in parts:
            part.to(self._device)
        try:
            yield
        finally:
            for part in parts:
                part.to("cpu")

    # ------------------------------------------------------------------------------------------ training

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.networks)

    def networks(self) -> list[nn.Module]:
        return self._trained.everything()

    def trainable_parameters(self) -> list[tuple[str, Parameter]]:
        return self._trained.parameters_of("policy")

    def add_roles(self, roles: Mapping[str, Role]) -> None:
        self._trained.add_roles(roles)
        self._switch()

    def _switch(self) -> None:
        """Sets the switches of all networks, those of new roles too."""
        self._switches.set(self.networks(), self._trained.role_count, self._recomputed)
        for vae in self._checkpointed_vae if self._switches.gradient_checkpointing else ():
            vae.enable_gradient_checkpointing(self._recomputed)

    @property
    def _checkpointed_vae(self) -> list[ModelMixin]:
        """The VAE, where diffusers can checkpoint it (not those of Wan and Qwen-Image)."""
        return [self.model.vae] if self.model.vae._supports_gradient_checkpointing else []

    def parameters_of(self, role: str) -> list[tuple[str, Parameter]]:
        return self._trained.parameters_of(role)

    def follow(self, step: int) -> None:
        self._trained.follow(step)

    def role(self, name: str) -> AbstractContextManager[None]:
        return self._trained.role(name)

    def save_lora(self, folder: Path) -> None:
        """pytorch_lora_weights.safetensors with its alpha (for `pipe.load_lora_weights`) and a PEFT folder beside it, of
        several networks one folder each. Equal tensors and settings give equal files."""
        networks = self.model.networks
        if not self._trained.has_lora:
            raise ValueError("got save_lora of a policy that trains full weights; expected a LoRA: save_networks")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp*"):  # safetensors writes a temporary file first; a killed save leaves it
            stale.unlink()
        layers = {name: adapter_state(network) for name, network in networks.items()}
        settings = {name: ordered(network.peft_config[ADAPTER].to_dict()) for name, network in networks.items()}
        LoraBaseMixin.write_lora_layers(
            _prefixed(layers), folder, is_main_process=True, weight_name=None, save_function=None, safe_serialization=True,
            lora_adapter_metadata=_prefixed(settings),
        )  # fmt: skip
        for name, network in networks.items():
            save_peft(network, folder / name if len(networks) > 1 else folder)
        for file in sorted(folder.rglob("*.safetensors")):
            order_header(file)

    def save_networks(self, folder: Path, write: bool = True) -> None:
        if self._trained.has_lora:
            raise ValueError(
                "got save_networks of a policy with a LoRA; expected one that trains full weights: save_lora"
            )
        for name, network in self.model.networks.items():
            found = _unsharded(network, write)
            if write:
                found.save_pretrained(folder / name)

    def pipeline_setup(self) -> list[str]:
        tiles = ["pipe.vae.enable_tiling()"] if self._vae_tiling else []
        dtypes = {self._autocast or network.dtype for network in self.model.networks.values()}
        casts = [CAST] if dtypes != {self.model.vae.dtype} else []
        return [*self.model.pipeline_setup(), *tiles, *casts]

    def pipeline_arguments(self, guidance_scale: float, size: Size) -> dict[str, Any]:
        return self.model.pipeline_arguments(guidance_scale, size, self.negative_prompt)

    def pipeline_inputs(self, records: Sequence[PromptRecord], guidance_scale: float, size: Size) -> dict[str, Any]:
        guided = self.rows_per_state(guidance_scale) > 1
        negatives = [self._negative(record) for record in records] if guided else None
        return self.model.pipeline_inputs(records, negatives, size)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return self.model.to_pipeline(latents)

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return self.model.from_pipeline(latents, size)

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return self.model.pipeline_sigmas(sigmas)


def _prefixed(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All in one, with the network's name before each key: as the pipelines' `load_lora_weights` reads it."""
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def _unsharded(network: ModelMixin, keep: bool) -> ModelMixin:
    """The network, as diffusers saves it; of one that FSDP2 shards a copy on the CPU, for the process that does `keep` it."""
    if not isinstance(network, FSDPModule):
        return network
    sharded: Any = network
    tensors = {name: whole(tensor, keep) for name, tensor in sharded.state_dict().items()}
    bases: tuple[Any, ...] = type(network).__mro__
    with torch.device("meta"):
        plain: ModelMixin = bases[bases.index(FSDPModule) + 1].from_config(sharded.config)
    if keep:
        plain.load_state_dict(tensors, assign=True)
    return plain


def _parts(model: Model, name: Offloadable) -> Sequence[nn.Module]:
    return [model.vae] if name == "vae" else model.encoders
