"""Z-Image and Z-Image-Turbo: a ZImagePipeline as a model, sampled by the Euler steps of its own scheduler.

In fp32 on the CPU the deterministic rollout equals the pipeline's call exactly if the network calls have equal batches and
the prompts were encoded in equal batches. The network's time runs from 0 (noise) to 1 (data), and it predicts the velocity's negative.

The guidance scale is the pipeline's own number g, of v_c + g·(v_c − v_u), which is 1 + g in the count of arXiv:2207.12598. Only 1
differs: here, as in every family, it means none, for which the pipeline has 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from flowalign.data import PromptRecord
from flowalign.models import scaled_vae
from flowalign.models.base import Network, Size
from flowalign.models.conditions import Conditions
from flowalign.models.family import Configs, Distilled, Family, check_image, prompts_and_negatives, vae_reduction
from flowalign.models.flow_match import flow_match_call, flow_match_path, levels_from
from flowalign.models.guidance import classifier_free_rows, needed
from samplers import ODE, RectifiedFlow

# as in diffusers' train_dreambooth_lora_z_image.py
TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
PATCH = 2  # the only patch of the released networks


class ZImageModel:
    """Satisfies `flowalign.models.base.Model`.

    max_sequence_length: of the prompts. cfg_truncation: there is no guidance where 1 − σ is larger; where it is below 1, such
    states take one network row, which a forecast does not know. cfg_normalization: the norm of a guided velocity is at most
    this many times that of v_c; 0: it is not bounded."""

    path = RectifiedFlow()

    def __init__(
        self, pipeline: ZImagePipeline, max_sequence_length: int = 512, cfg_truncation: float = 1.0,
        cfg_normalization: float = 0.0,
    ) -> None:  # fmt: skip
        flow_match_path({**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__})
        if not 0 <= cfg_truncation <= 1 or cfg_normalization < 0:
            raise ValueError(
                f"got cfg_truncation={cfg_truncation}, cfg_normalization={cfg_normalization}; expected a truncation from 0 to 1 (guidance "
                "in all steps), and a normalization of at least 0 (none)"
            )
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder]
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.max_sequence_length = max_sequence_length
        self.cfg_truncation = cfg_truncation
        self.cfg_normalization = float(cfg_normalization)

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        scheduler, tokens = self.pipeline.scheduler, (latent_shape[-2] // PATCH) * (latent_shape[-1] // PATCH)
        settings = scheduler.config
        mu = calculate_shift(
            tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift
        )
        return levels_from(scheduler, get_default_z_image_sigmas(num_inference_steps), mu)

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        """embeds [n, max_sequence_length, D], 0 behind the text; length [n]."""
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[record.prompt for record in records], device=self.encoders[0].device,
            do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
        )  # fmt: skip
        padded = [torch.cat([row, row.new_zeros(self.max_sequence_length - len(row), row.shape[1])]) for row in embeds]
        return Conditions({"embeds": torch.stack(padded), "length": torch.tensor([len(row) for row in embeds])})

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        network, time = networks["transformer"], self._time(x, sigma)
        guided = torch.empty(0, dtype=torch.long) if guidance_scale == 1.0 else self._guided(time)
        if not len(guided):
            return self._predict(network, x, time, conditions)
        others = x[guided], time[guided], needed(negative, guidance_scale).rows(guided)
        if detach_uncond:
            own = self._predict(network, x, time, conditions)
            with torch.no_grad():
                unconditional = self._predict(network, *others)
        else:  # one call, conditional rows first
            together = Conditions.cat([conditions, others[2]])
            both = self._predict(network, torch.cat([x, others[0]]), torch.cat([time, others[1]]), together)
            own, unconditional = both[: len(x)], both[len(x) :]
        conditional = own[guided]
        velocity = conditional + guidance_scale * (conditional - unconditional)
        return own.index_put((guided,), self._bounded(velocity, conditional))

    def _time(self, x: Tensor, sigma: Tensor) -> Tensor:
        steps = self.pipeline.scheduler.config.num_train_timesteps
        return (1000 - sigma.to(x.device, torch.float32) * steps) / 1000

    def _guided(self, time: Tensor) -> Tensor:
        """The states that are guided. Only a truncation needs to know the levels, which costs a host synchronization."""
        if self.cfg_truncation == 1.0:
            return torch.arange(len(time), device=time.device)
        return (time.double() <= self.cfg_truncation).nonzero().flatten()

    def _bounded(self, velocity: Tensor, conditional: Tensor) -> Tensor:
        if not self.cfg_normalization:
            return velocity
        largest, norm = self.cfg_normalization * _norms(conditional), _norms(velocity)
        return torch.where(norm > largest, velocity * (largest / norm), velocity)

    def _predict(self, network: Network, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The network takes a text as long as it is: a row less padding. To know how long costs a host synchronization."""
        embeds, length = conditions.tensors["embeds"].to(x.device, self.dtype), conditions.tensors["length"]
        lengths = [embeds.shape[1]] * len(x) if length.is_meta else length.tolist()  # no values there: the longest
        found = network(
            list(x.to(self.dtype).unsqueeze(2).unbind()),
            time,
            [row[:count] for row, count in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([row.float() for row in found]).squeeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        return scaled_vae.decode(self.vae, latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return scaled_vae.encode(self.vae, images)

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {
            "height": size.height, "width": size.width, "guidance_scale": 0.0 if guidance_scale == 1.0 else guidance_scale,
            "negative_prompt": negative_prompt, "max_sequence_length": self.max_sequence_length,
            "cfg_truncation": self.cfg_truncation, "cfg_normalization": self.cfg_normalization,
        }  # fmt: skip

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return prompts_and_negatives(records, negatives)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return flow_match_call(sigmas)


def _norms(rows: Tensor) -> Tensor:
    """[n, 1, 1, 1], each computed alone, as the pipeline does."""
    return torch.stack([torch.linalg.vector_norm(row) for row in rows])[:, None, None, None]


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor = vae_reduction(configs["vae"])
    check_image(size, PATCH * factor)
    return (configs["transformer"]["in_channels"], size.height // factor, size.width // factor)


def _distilled(configs: Configs) -> Distilled:
    """Of the two that are released Z-Image-Turbo has the shift 3, Z-Image 6; 8 steps, says its card."""
    return Distilled(8 if configs["scheduler"].get("shift") == 3.0 else None)


# released: "chat_template" of Qwen3, which leaves thinking on
CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TINY = {
    "transformer": (ZImageTransformer2DModel, {
        "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
        "axes_dims": [4, 2, 2], "axes_lens": [1024, 64, 64],
    }),
    "vae": (AutoencoderKL, {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 2, "latent_channels": 4, "scaling_factor": 0.3611,
        "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    }),
    "text_encoder": (Qwen3Model, {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "max_position_embeddings": 1024,
    }),
    "tokenizer": (Qwen2Tokenizer, {"chat_template": CHAT, "special_tokens": ("<|im_start|>", "<|im_end|>")}),
    "scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 6.0, "use_dynamic_shifting": False}),
}  # fmt: skip
TURBO = TINY | {"scheduler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_dynamic_shifting": False})}

FAMILY = Family(
    pipeline=ZImagePipeline,
    model=ZImageModel,
    networks={"transformer": ZImageTransformer2DModel},
    targets=TARGETS,
    path=flow_match_path,
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    distilled=_distilled,
    tiny={"z_image": TINY, "z_image_turbo": TURBO},
)
