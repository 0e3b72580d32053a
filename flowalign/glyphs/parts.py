"""The untrained parts of the Glyphs pipeline, each of the very class that Stable Diffusion 3 uses, only small.

What makes them learn on a CPU: a one-level VAE (24x48 latents, no downsampling) whose latents stay close to the pixels;
CLIP encoders of one layer, because SD3 reads `hidden_states[-2]`, which then is exactly token plus position embedding;
embeddings initialized at CLIP's position in the network but with a standard deviation near 1, not 0.02.
"""

import string
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import WIDTH

TOKENS = 16  # start, 14 tokens of a prompt, end
TEMPLATE = ("the", "word", "in", "on", "a", "background", *INKS, *PAPERS)
TEXT_WIDTH = 64  # per encoder; SD3 concatenates the two, so the joint sequence is 128 wide
EMBEDDING_STD = 0.7  # token + position then has unit variance
PATCH = 4
SHIFT = 3.0  # of the sampling schedule; reads better than 1 at six steps


def build_tokenizer() -> CLIPTokenizer:
    return spelling_clip_tokenizer(TEMPLATE, TOKENS)


def spelling_clip_tokenizer(template: Iterable[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the template's words and spells everything else; length: most tokens of a prompt.

    BPE without merges over lower-case letters: quoted capitals are lower-cased and split. The template's words are
    added tokens matched on the raw text (normalized=False), so lower-case `red` is one token and `"RED"` three.
    """
    letters = string.ascii_lowercase
    tokens = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), '"', '"</w>', "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=length
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in template])
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A one-layer CLIP text encoder for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    embeddings = encoder.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=EMBEDDING_STD)
    return encoder


def build_vae(channels: int = 16) -> AutoencoderKL:
    """A KL-VAE of one level: as many latent pixels as pixels. It starts near the identity and is then trained.

    One normalization group: with several, group norm would take each group's brightness out of the picture.
    """
    vae = AutoencoderKL(
        block_out_channels=(channels,),
        norm_num_groups=1,
        latent_channels=3,
        sample_size=WIDTH,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    _start_near_identity(vae.encoder)
    _start_near_identity(vae.decoder)
    with torch.no_grad():
        vae.encoder.conv_out.bias[3:] = -6.0  # log-variance of the posterior
    return vae


@torch.no_grad()
def _start_near_identity(half: Encoder | Decoder, level: float = 8.0) -> None:
    """Set an encoder or decoder of the VAE to pass its three input channels on, nearly unchanged.

    Residual blocks add nothing at first. Channels carry x and -x, since silu(x) - silu(-x) = x, and two constants of
    +-level that dominate the last group norm's deviation, so that it divides every picture by about the same number.
    """
    for module in half.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    first, last = half.conv_in, half.conv_out
    first.weight[:8].zero_()
    first.bias.zero_()
    first.bias[6], first.bias[7] = level, -level
    last.weight.zero_()
    last.bias.zero_()
    deviation = level * (2 / first.out_channels) ** 0.5
    for color in range(3):
        first.weight[color, color, 1, 1] = 1.0
        first.weight[3 + color, color, 1, 1] = -1.0
        last.weight[color, color, 1, 1] = deviation
        last.weight[color, 3 + color, 1, 1] = -deviation


def build_transformer(layers: int = 5, heads: int = 4, head_width: int = 32) -> SD3Transformer2DModel:
    """An SD3 transformer over 6x12 patches of the latents."""
    return SD3Transformer2DModel(
        sample_size=WIDTH,
        patch_size=PATCH,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        caption_projection_dim=heads * head_width,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=WIDTH // PATCH,
        qk_norm="rms_norm",
    )


def build_pipeline() -> StableDiffusion3Pipeline:
    """All parts, untrained, without the optional third (T5) text encoder."""
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )
