"""Qwen-Image-Edit and Qwen-Image-Edit-Plus (the checkpoints 2509 and 2511): Qwen-Image beside source images.

The text encoder sees the images, and their latents stand behind those of the state. Both are fitted to an area that is the pipeline's,
in the image's own aspect ratio, whatever the size of what is generated: prompts that are encoded together need source images of one
aspect ratio, and equally many. Parity as of Qwen-Image, with one record in a call, as the pipelines take them.
"""

from __future__ import annotations

from dataclasses import replace

from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from flowalign.models.families import qwen_image
from flowalign.models.families.qwen_image import QwenImageModel

AREA = 1024 * 1024  # pixels of a source image in the call of QwenImageEditPipeline, for text encoder and VAE


def edit_model(
    pipeline: QwenImageEditPipeline, max_sequence_length: int | None = None, fixed_length: bool = False
) -> QwenImageModel:
    """One source image, seen by text encoder and VAE alike."""
    return QwenImageModel(pipeline, max_sequence_length, fixed_length=fixed_length, fit=_fit)


def edit_plus_model(
    pipeline: QwenImageEditPlusPipeline, max_sequence_length: int | None = None, fixed_length: bool = False
) -> QwenImageModel:
    """One to three source images, each in its own aspect ratio; the text encoder sees them smaller."""
    return QwenImageModel(pipeline, max_sequence_length, fixed_length=fixed_length, fit=_fit_plus)


def _fit(processor: VaeImageProcessor, images: list[Image.Image]) -> tuple[list[Image.Image], list[Tensor]]:
    (image,) = images
    width, height, _ = calculate_dimensions(AREA, image.width / image.height)
    seen = processor.resize(image, height, width)
    return [seen], [processor.preprocess(seen, height, width)]


def _fit_plus(processor: VaeImageProcessor, images: list[Image.Image]) -> tuple[list[Image.Image], list[Tensor]]:
    seen, pixels = [], []
    for image in images:
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, image.width / image.height)
        seen.append(processor.resize(image, height, width))
        width, height = plus.calculate_dimensions(plus.VAE_IMAGE_SIZE, image.width / image.height)
        pixels.append(processor.preprocess(image, height, width))
    return seen, pixels


SEEN = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 8 * 28 * 28}}  # pixels: 4 to 8 tokens of an image
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BEFORE = 257  # tokens of the tiny tokenizer before these: the bytes, and the end of a text
TINY = {
    **qwen_image.TINY,
    # 16 pixels per latent, since source images have a million pixels
    "vae": (AutoencoderKLQwenImage, {
        "base_dim": 4, "num_res_blocks": 0, "dim_mult": [1, 1, 1, 1, 1], "temperal_downsample": [False, True, True, False],
    }),
    "text_encoder": (Qwen2_5_VLForConditionalGeneration, {
        **qwen_image.TEXT_ENCODER, "vision_start_token_id": BEFORE + 2, "vision_end_token_id": BEFORE + 3,
        "image_token_id": BEFORE + 4, "video_token_id": BEFORE + 5,
    }),
    "tokenizer": (Qwen2Tokenizer, {"special_tokens": SPECIAL}),
    "processor": (Qwen2VLProcessor, {
        "tokenizer": "tokenizer", "image_processor": (Qwen2VLImageProcessor, SEEN), "video_processor": (Qwen2VLVideoProcessor, SEEN),
    }),
}  # fmt: skip

FAMILY = replace(
    qwen_image.FAMILY, pipeline=QwenImageEditPipeline, model=edit_model, source_images=(1, 1), own_fit=True,
    tiny={"qwen_image_edit": TINY},
)  # fmt: skip
PLUS = replace(
    qwen_image.FAMILY, pipeline=QwenImageEditPlusPipeline, model=edit_plus_model, source_images=(1, 3), own_fit=True,
    tiny={"qwen_image_edit_plus": TINY},
)  # fmt: skip
