"""What a configured policy takes of a device, in bytes, measured without weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from flowalign.config import PolicySettings, TrainConfig
from flowalign.data import load_prompts
from flowalign.models import Conditions, load_policy
from flowalign.models.empty_pipeline import empty_pipeline
from flowalign.models.live_bytes import forward_bytes, update_bytes

FP32 = 4
# policy.quantization -> bytes per number of a linear layer: int8; NF4 with an fp32 scale for each 64 numbers (2305.14314)
QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + FP32 / 64}


class Footprint:
    """The policy that a run would load, on the meta device: its weights are counted, and what it holds meanwhile is measured by the
    family's own encode, velocity and decode of the largest bucket, once, when it is first asked for. Per state, image and prompt: linear in their number.

    numbers: that are trained. row: the conditions of one prompt, with those that guidance starts from."""

    def __init__(self, config: TrainConfig) -> None:
        settings, size = config.policy, config.largest_size
        self.has_lora = settings.trainable == "lora"
        pipeline = empty_pipeline(settings.path, settings.family, dtype=settings.dtype, vae_dtype=settings.vae_dtype)
        self._policy = load_policy(  # "none" for full weights: as the network computes, whatever its master weights are
            pipeline, lora=replace(settings.lora, init=None) if self.has_lora else None,
            trainable="lora" if self.has_lora else "none", family=settings.family,
            max_sequence_length=settings.max_sequence_length, options=settings.options, vae_tiling=settings.vae_tiling,
        )  # fmt: skip
        networks = list(self._policy.modules().values())
        if not self.has_lora:
            for network in networks:
                network.requires_grad_(True)
        parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self._networks, self._parameters = networks, [p for _, p in self._policy.trainable_parameters()]
        self.numbers = sum(parameter.numel() for parameter in self._parameters)
        self.vae = _nbytes(pipeline.vae)
        self.encoders = sum(_nbytes(part) for part in parts if part not in networks) - self.vae
        self._latent = torch.empty(1, *self._policy.latent_shape(size), device="meta")
        self.latent = FP32 * self._latent.numel()
        self.pixels = FP32 * 3 * size.pixels
        self._size = size
        self._record = load_prompts(config.prompts)[0]
        self._states: dict[tuple[float, bool | None], int] = {}

    def weights(self, settings: PolicySettings) -> int:
        """Of the networks, without what is trained beside them; full weights are fp32, with a cast to another dtype beside."""
        if not self.has_lora:
            return self.copy + (0 if settings.dtype == "fp32" else sum(each.nbytes for each in self._parameters))
        trained = {id(parameter) for parameter in self._parameters}
        total = 0.0
        for network in self._networks:
            packed = {id(part.weight) for part in network.modules() if isinstance(part, nn.Linear)}
            for tensor in (*network.parameters(), *network.buffers()):
                if id(tensor) in trained:
                    continue
                if settings.quantization is not None and id(tensor) in packed:
                    total += tensor.numel() * QUANTIZED[settings.quantization]
                else:
                    total += tensor.nbytes
        return int(total)

    @property
    def copy(self) -> int:
        """Of another set of what is trained, such as a role: an adapter, or whole networks in fp32."""
        buffers = [] if self.has_lora else [buffer for network in self._networks for buffer in network.buffers()]
        return FP32 * self.numbers + sum(buffer.nbytes for buffer in buffers)

    @cached_property
    def encode(self) -> int:
        """While one prompt is encoded."""
        return forward_bytes(lambda: self._policy.encode([self._record], together=True, size=self._size))

    @cached_property
    def _conditions(self) -> Conditions:
        return self._policy.encode([self._record], negative=True, size=self._size)

    @property
    def row(self) -> int:
        negative = self._conditions.negative
        return self._conditions.nbytes + (0 if negative is None else negative.nbytes)

    def state(self, guidance_scale: float) -> int:
        """While the velocity of one state is evaluated without gradient."""
        return self._measured(guidance_scale, None)

    def trained_state(self, guidance_scale: float, checkpointing: bool) -> int:
        """While one state goes forward and backward. checkpointing: blocks store their inputs only."""
        return self._measured(guidance_scale, checkpointing)

    def _measured(self, guidance_scale: float, checkpointing: bool | None) -> int:
        key, sigma = (guidance_scale, checkpointing), torch.full((1,), 0.5)

        def velocity() -> Tensor:
            return self._policy.velocity(self._latent, sigma, self._conditions, guidance_scale=guidance_scale)

        if key not in self._states:
            if checkpointing is None:
                self._states[key] = forward_bytes(velocity)
            elif checkpointing:
                with self._policy.checkpointed():
                    self._states[key] = update_bytes(velocity, self._parameters)
            else:
                self._states[key] = update_bytes(velocity, self._parameters)
        return self._states[key]

    @cached_property
    def decode(self) -> int:
        """While one image is decoded."""
        return forward_bytes(lambda: self._policy.decode(self._latent))

    @cached_property
    def decode_with_gradient(self) -> int:
        """While one image is decoded forward and backward."""
        latent = Parameter(self._latent)
        return update_bytes(lambda: self._policy.decode(latent, grad=True), [latent])


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
