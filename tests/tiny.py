"""A very small random SD3 pipeline of the Glyphs layout: 24×48 pixels, patch 4, 16 tokens, no T5."""

from pathlib import Path

import torch

from flowalign.glyphs import parts


def tiny_sd3(folder: Path, seed: int = 0) -> Path:
    """Saves the pipeline (fp32, two layers, 32 wide) into `folder` and returns it."""
    torch.manual_seed(seed)
    pipeline = parts.build_pipeline()
    pipeline.register_modules(transformer=parts.build_transformer(layers=2, heads=2, head_width=16))
    for parameter in pipeline.transformer.parameters():  # SD3 starts its last layer at 0; here it has to matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=0.9)
    pipeline.save_pretrained(folder)
    return folder
