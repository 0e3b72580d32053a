"""A model family of a user: two networks with a boundary in σ, source images as conditions, and its own guidance rule."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.data import PromptRecord
from flowalign.glyphs import parts
from flowalign.models import Conditions, Family, Size
from flowalign.models.base import Network
from flowalign.models.family import Configs, check_image, prompts_and_negatives, vae_reduction
from flowalign.models.guidance import classifier_free_rows
from samplers import ODE, RectifiedFlow
from tests.helpers.tiny import tiny_transformer

BOUNDARY = 0.9  # from here up the noise is removed by `transformer`, below by `transformer_2`
PATCH = parts.PATCH


class EditPipeline(DiffusionPipeline):
    """Parts only: the family does the rest."""

    def __init__(
        self, transformer: SD3Transformer2DModel, transformer_2: SD3Transformer2DModel, vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, vae=vae, text_encoder=text_encoder,
            tokenizer=tokenizer, scheduler=scheduler,
        )  # fmt: skip


def save_pipeline(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = parts.build_tokenizer()
    EditPipeline(
        tiny_transformer(), tiny_transformer(), parts.build_vae(), parts.build_text_encoder(tokenizer), tokenizer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_prompts(folder: Path, count: int = 4) -> Path:
    """A jsonl of edits, each of an image of its own color."""
    rows = []
    for number in range(count):
        Image.new("RGB", (48, 24), (60 * number, 200 - 50 * number, 90)).save(folder / f"{number}.png")
        rows.append({"prompt": f'the word "{"KMLR"[number]}"', "image": f"{number}.png", "negative_prompt": "a word"})
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class EditModel:
    """Satisfies `flowalign.models.Model`. The latents of the source image stand below those of the state."""

    path = RectifiedFlow()

    def __init__(self, pipeline: EditPipeline, max_sequence_length: int | None = None) -> None:
        self.pipeline = pipeline
        self.networks = {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}
        self.vae = pipeline.vae
        self.encoders = [pipeline.text_encoder, pipeline.vae]

    def sigmas(self, num_inference_steps: int, latent_shape: Sequence[int]) -> Tensor:
        self.pipeline.scheduler.set_timesteps(num_inference_steps, device="cpu")
        return self.pipeline.scheduler.sigmas.float().clone()

    def solver(self) -> ODE:
        return ODE()

    def encode(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        tokens = self.pipeline.tokenizer(
            [record.prompt for record in records], padding="max_length", truncation=True, return_tensors="pt"
        )
        found = self.pipeline.text_encoder(tokens.input_ids)
        images = torch.stack([pil_to_tensor(record.images[0].open()) for record in records])
        source = self.encode_images(images.float() / 127.5 - 1)
        embeds = found.last_hidden_state
        return Conditions({
            "embeds": torch.cat([embeds, embeds], -1), "pooled": torch.cat([found.text_embeds] * 2, -1),
            "source": source,
        })  # fmt: skip

    def velocity(
        self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions,
        negative: Conditions | None, guidance_scale: float, detach_uncond: bool,
    ) -> Tensor:  # fmt: skip
        """Guided: v_u + w·(v_c − v_u), scaled to the norm of v_c, the two halves in calls of their own."""
        own = self._predict(networks, x, sigma, conditions)
        if guidance_scale == 1.0:
            return own
        assert negative is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_uncond):
            other = self._predict(networks, x, sigma, negative)
        guided = other + guidance_scale * (own - other)
        norms = [v.flatten(1).norm(dim=1)[:, None, None, None] for v in (own, guided)]
        return guided * (norms[0] / norms[1])

    def _predict(self, networks: Mapping[str, Network], x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        found = torch.empty_like(x)
        high = (sigma >= BOUNDARY).to(x.device)
        for name, rows in (("transformer", high), ("transformer_2", ~high)):
            if bool(rows.any()):
                found = found.index_put(
                    (rows.nonzero().flatten(),), self._call(networks[name], x, sigma, conditions, rows)
                )
        return found

    def _call(self, network: Network, x: Tensor, sigma: Tensor, conditions: Conditions, rows: Tensor) -> Tensor:
        own = conditions.rows(rows.nonzero().flatten()).tensors
        output = network(
            hidden_states=torch.cat([x[rows], own["source"]], -2), timestep=1000 * sigma[rows],
            encoder_hidden_states=own["embeds"], pooled_projections=own["pooled"], return_dict=False,
        )[0]  # fmt: skip
        return output[:, :, : x.shape[-2]].float()

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]

    def encode_images(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent_dist.mode()

    def pipeline_setup(self) -> list[str]:
        return []

    def pipeline_arguments(self, guidance_scale: float, size: Size, negative_prompt: str) -> dict[str, Any]:
        return {}

    def pipeline_inputs(
        self, records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None, size: Size
    ) -> dict[str, Any]:
        return prompts_and_negatives(records, negatives)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents

    def from_pipeline(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def pipeline_sigmas(self, sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
        return [], {"sigmas": sigmas[:-1].tolist()}


def _latent_shape(size: Size, configs: Configs) -> tuple[int, ...]:
    factor = vae_reduction(configs["vae"])
    check_image(size, factor * PATCH)
    return (3, size.height // factor, size.width // factor)


FAMILY = Family(
    pipeline=EditPipeline,
    model=EditModel,
    networks={"transformer": SD3Transformer2DModel, "transformer_2": SD3Transformer2DModel},
    targets=("attn.to_q", "attn.to_v"),
    path=lambda scheduler: RectifiedFlow(),
    latent_shape=_latent_shape,
    rows_per_state=classifier_free_rows,
    source_images=(1, 1),
)
