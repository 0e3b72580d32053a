"""ImageReward's network: BLIP, whose text encoder looks at the image in every layer, and a head on its first token.

Built from transformers' BLIP classes. The published file has the names of BLIP's own code, which are translated; every
tensor has to find its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewards.image.checkpoints import load_strictly
from rewards.image.heads import head_of

VISION = {  # what stands in the file -> what stands in transformers' BlipVisionModel
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
HEAD_WIDTH = 64  # of the attention heads of BLIP's vision towers, base and large


def read_network(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> tuple[Any, Any, nn.Module]:
    """(vision tower, text encoder, head) of the tensors `state` of the file `path` and the text encoder's med_config.json."""
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if key.startswith(UNUSED):
            continue
        if prefix is None:
            raise ValueError(f"got {path} with a tensor {key!r}; expected names that begin with {', '.join(parts)}")
        parts[prefix][key.removeprefix(prefix)] = tensor
    vision, text, head = parts.values()
    tower = vision_tower(vision, path)
    return tower, text_encoder(text, config, tower.config.hidden_size, path), head_of(head, f"{path} (mlp.*)")


def vision_tower(state: Mapping[str, Tensor], path: Path) -> Any:
    """A BlipVisionModel of the sizes of its tensors."""
    from transformers import BlipVisionConfig, BlipVisionModel

    if "patch_embed.proj.weight" not in state or "pos_embed" not in state or "blocks.0.mlp.fc1.weight" not in state:
        raise ValueError(
            f"got {path} without blip.visual_encoder.*; expected ImageReward's own file, not a converted one"
        )
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * round((state["pos_embed"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    tower = BlipVisionModel(config)
    load_strictly(tower, {_translated(key): tensor for key, tensor in state.items()}, path)
    return tower


def text_encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], image_width: int, path: Path) -> Any:
    """A BlipTextModel, bidirectional, with cross-attention to image tokens of `image_width`; its names are those of the file."""
    from transformers import BlipTextConfig, BlipTextModel

    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    if absent := [name for name in sizes if name not in config]:
        raise ValueError(f"got a med_config.json without {', '.join(absent)}; expected ImageReward's")
    # is_decoder makes the cross-attention; the mask is causal only if the call asks for it
    settings = BlipTextConfig(
        **{name: config[name] for name in sizes}, encoder_hidden_size=image_width, is_decoder=True,
        bos_token_id=None, sep_token_id=None,
    )  # fmt: skip
    encoder = BlipTextModel(settings, add_pooling_layer=False)
    load_strictly(encoder, state, path)
    return encoder


def _translated(key: str) -> str:
    if key.startswith("norm."):
        return f"post_layernorm.{key.removeprefix('norm.')}"
    for theirs, ours in VISION.items():
        key = key.replace(theirs, ours)
    return key
