"""The untrained parts of Glyphs-Video, each of the very class that Wan 2.1 uses, only small.

The VAE takes 4x4 pixels and two frames to a latent of 20 channels: 2x2 pixels are first taken together, as in Wan 2.2's
5B, which makes its decoder four times as fast. 9 frames of 32x64 are latents [20, 5, 8, 16], 160 tokens.
"""

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.spelling import spelling_tokenizer
from flowalign.glyphs.video.prompts import DIRECTIONS

TOKENS = 20  # of the longest prompt: 17 with the end
TEMPLATE = ("the", "word", "in", "turning", "on", "a", "background", "moving", "then", *INKS, *PAPERS, *DIRECTIONS)
CHANNELS = 20
TEXT_WIDTH = 64
SHIFT = 3.0  # of the sampling schedule


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Two layers: a token learns what stands before it, which tells a first color or direction from a second."""
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return UMT5EncoderModel(config)


LOG_VARIANCE = -6.0  # of the VAE's posterior at first: at 0, noise hides the latents and little is learnt


def build_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=20, z_dim=CHANNELS, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=4, scale_factor_temporal=2,
    )  # fmt: skip
    _start_near_linear(vae)
    return vae


@torch.no_grad()
def _start_near_linear(vae: AutoencoderKLWan, level: float = 4.0) -> None:
    """Sets the VAE so that it learns within minutes. Residual blocks add nothing at first; two constant channels of +-level
    dominate what the norms divide by, which would else take away how bright a pixel is; frames pass the convolutions over time;
    and the posterior is narrow."""
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
    up, down = vae.decoder.up_blocks[0].upsamplers[0], vae.encoder.down_blocks[1]
    for convolution in (vae.encoder.conv_in, vae.decoder.conv_in):
        convolution.weight[-2:].zero_()
    for convolution in (
        vae.encoder.conv_in,
        vae.encoder.down_blocks[2].conv_shortcut,
        vae.decoder.conv_in,
        up.resample[1],
    ):
        convolution.bias[-2:] = torch.tensor([-level, level])
    for weight in (down.time_conv.weight, *up.time_conv.weight.chunk(2)):
        weight.mul_(0.1)
        weight[:, :, -1, 0, 0] += torch.eye(len(weight))
    vae.quant_conv.weight[CHANNELS:].zero_()
    vae.quant_conv.bias[CHANNELS:] = LOG_VARIANCE


def build_transformer(layers: int = 5, heads: int = 4, head_width: int = 32) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_width, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=64, ffn_dim=3 * heads * head_width, num_layers=layers,
    )  # fmt: skip


def build_pipeline() -> WanPipeline:
    """All parts, untrained."""
    tokenizer = spelling_tokenizer(TEMPLATE, TOKENS)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer),
        transformer=build_transformer(),
        vae=build_vae(),
        scheduler=UniPCMultistepScheduler(
            flow_shift=SHIFT, use_flow_sigmas=True, prediction_type="flow_prediction", num_train_timesteps=1000
        ),
    )


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Puts mean and deviation of each channel of latents [N, C, F, h, w] into the VAE's configuration."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
