"""Architectures of public models as configurations, without weights: what a forecast of memory reads."""

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, T5Config, T5Tokenizer

from flowalign.glyphs import parts

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm", "patch_size": 2, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
FLUX_1: dict[str, Any] = {"guidance_embeds": True}  # the defaults are those of FLUX.1
WAN_1_3B: dict[str, Any] = {
    "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}  # fmt: skip


def sd35_medium(folder: Path, depth: int | None = None) -> Path:
    """A pipeline folder of Stable Diffusion 3.5 Medium with every configuration and no weights. The tokenizers know few words. depth:
    layers of the network and of T5, in place of 24."""
    transformer = SD35_MEDIUM | ({} if depth is None else {"num_layers": depth, "dual_attention_layers": [0]})
    for name, cls, config in (("transformer", SD3Transformer2DModel, transformer), ("vae", AutoencoderKL, VAE)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": cls.__name__, **config}))
    CLIPTextConfig(**CLIP_L).save_pretrained(folder / "text_encoder")
    CLIPTextConfig(**CLIP_G).save_pretrained(folder / "text_encoder_2")
    T5Config(**T5_XXL | {"num_layers": depth or T5_XXL["num_layers"]}).save_pretrained(folder / "text_encoder_3")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = parts.build_tokenizer()
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(folder / name)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0)]
    T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
