"""The untrained parts of Glyphs-Edit, each of the very class that FLUX.1 Kontext uses, only small.

The VAE takes 2x2 pixels to a latent of 12 channels, and the transformer 2x2 latents to a token: 72 of the picture, 72 of its source.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowalign.glyphs.parts import spelling_clip_tokenizer
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import WIDTH
from flowalign.glyphs.spelling import spelling_tokenizer

TOKENS = 12  # of the longest instruction: 8 with the end, 10 for CLIP
TEMPLATE = ("write", "it", "in", "put", "on", "a", "background", "change", "the", "word", "to", *INKS, *PAPERS)
CHANNELS = 12
TEXT_WIDTH = 64
SHIFT = 3.0  # of the sampling schedule
LOG_SHIFT = 1.0986122886681098  # its logarithm, which the scheduler of FLUX takes, at any size


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """One layer; only its pooled output is read."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers: a letter learns what stands before it, which is its place in the word."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKL:
    """One normalization group: with several, group norm would take each group's brightness out of the picture."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=1, latent_channels=CHANNELS, sample_size=WIDTH, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False, force_upcast=False,
    )  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_out.bias[CHANNELS:] = -6.0  # log-variance of the posterior
    return vae


def build_transformer(double: int = 2, single: int = 3, heads: int = 4, head_width: int = 32) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=double, num_single_layers=single, attention_head_dim=head_width,
        num_attention_heads=heads, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )  # fmt: skip


def build_pipeline() -> FluxKontextPipeline:
    """All parts, untrained."""
    tokenizer, tokenizer_2 = spelling_clip_tokenizer(TEMPLATE, TOKENS), spelling_tokenizer(TEMPLATE, TOKENS)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=SHIFT, use_dynamic_shifting=True, base_shift=LOG_SHIFT, max_shift=LOG_SHIFT
    )
    return FluxKontextPipeline(
        transformer=build_transformer(),
        scheduler=scheduler,
        vae=build_vae(),
        text_encoder=build_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )
