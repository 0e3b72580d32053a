"""A measured footprint as plain numbers, kept in a file: for a table of many cards, which measures each model once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flowalign.config import PolicySettings, TrainConfig
from flowalign.forecast.footprint import Footprint
from flowalign.models.quantization import Quantization


@dataclass(frozen=True)
class RecordedFootprint:
    """Stands for a Footprint in `Memory`: the same names, in bytes. networks: weights by policy.quantization ("none" without).
    states: guidance scale -> while one state is evaluated ("forward") and trained ("plain", "checkpointed").

    Not kept: another size, dtype, LoRA or guidance scale than those of the configuration that was measured; a scale is a KeyError."""

    has_lora: bool
    numbers: int
    copy: int
    vae: int
    encoders: int
    latent: int
    pixels: int
    row: int
    encode: int
    decode: int
    decode_with_gradient: int
    networks: Mapping[str, int]
    states: Mapping[str, Mapping[str, int]]

    @staticmethod
    def of(footprint: Footprint, config: TrainConfig) -> RecordedFootprint:
        """Measures all of it, as the LoRA, the size and the guidance scales of `config` have it."""
        own, policy, rollout = footprint, config.policy, config.rollout
        states: dict[str, dict[str, int]] = {
            str(scale): {"forward": own.state(scale)}
            for scale in (rollout.guidance_scale, config.evaluation.guidance_scale)
        }
        for name, checkpointing in (("plain", False), ("checkpointed", True)):
            states[str(rollout.guidance_scale)][name] = own.trained_state(rollout.guidance_scale, checkpointing)
        kinds: tuple[Quantization | None, ...] = (None, "8bit", "4bit")
        networks: dict[str, int] = {kind or "none": own.weights(replace(policy, quantization=kind)) for kind in kinds}
        return RecordedFootprint(
            own.has_lora, own.numbers, own.copy, own.vae, own.encoders, own.latent, own.pixels, own.row, own.encode, own.decode,
            own.decode_with_gradient, networks, states,
        )  # fmt: skip

    def weights(self, settings: PolicySettings) -> int:
        return self.networks[settings.quantization or "none"]

    def state(self, guidance_scale: float) -> int:
        return self.states[str(guidance_scale)]["forward"]

    def trained_state(self, guidance_scale: float, checkpointing: bool) -> int:
        return self.states[str(guidance_scale)]["checkpointed" if checkpointing else "plain"]
