"""Very small checkpoints of reward models, with the names and layouts of the published ones, for tests on the CPU.

A checkpoint is made once in a process, in a temporary folder that goes when the process ends.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

AESTHETIC = {"linear": (0, 2, 4, 6, 7), "relu": (0, 3, 6, 9, 11), "v1": ()}  # places of the linear layers
WIDTHS = (1024, 128, 64, 16, 1)  # of the heads of LAION and ImageReward
PIECES = [*"abcdefghijklmnopqrstuvwxyz0123456789,.'\"", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]


@cache
def folder(name: str) -> Path:
    path = Path(tempfile.mkdtemp(prefix=f"flowalign-tiny-{name}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draws from a generator of its own: what is made depends neither on the order of the tests nor the tests on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@cache
def clip(projection: int = 16) -> Path:
    """The folder of a CLIPModel of transformers and its tokenizer, as OpenAI's and PickScore's: images of 32 pixels, 77
    positions, logit scale 1/0.07."""
    from transformers import CLIPConfig, CLIPModel

    path, tokenizer = folder(f"clip-{projection}"), clip_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **tower, "vocab_size": len(tokenizer), "projection_dim": projection, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {**tower, "projection_dim": projection, "image_size": 32, "patch_size": 8}
    with seeded():
        network = shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)))
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single bytes, without merges: 514 tokens, the end token last."""
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


@cache
def aesthetic_head(variant: str, width: int = 768) -> Path:
    """A file of LAION's: "linear" or "relu" (v2), or "v1", which is one layer."""
    path = folder("heads") / f"{variant}_{width}.pth"
    with seeded():
        torch.save(head_state(AESTHETIC[variant], width), path)
    return path


def head_state(places: Sequence[int], width: int, prefix: str = "layers.") -> dict[str, Tensor]:
    """Random tensors of a head; without places, of one layer with the keys `weight` and `bias`."""
    if not places:
        return {"weight": drawn(1, width), "bias": drawn(1)}
    state, inputs = {}, width
    for place, outputs in zip(places, WIDTHS, strict=True):
        state |= {f"{prefix}{place}.weight": drawn(outputs, inputs), f"{prefix}{place}.bias": drawn(outputs)}
        inputs = outputs
    return state


def open_clip_config(**text: Any) -> dict[str, Any]:
    """Of a network for images of 224 pixels; `text` changes entries of text_cfg."""
    words = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 56}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {**words, **text}}


@cache
def open_clip_folder(resize_mode: str = "shortest") -> Path:
    """A network of open_clip with a tokenizer of its own: open_clip_config.json, weights, tokenizer files."""
    import open_clip

    path, tokenizer = folder(f"open_clip-{resize_mode}"), clip_tokenizer()
    config = open_clip_config(context_length=24, vocab_size=len(tokenizer), hf_tokenizer_name="here")
    seen = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": resize_mode}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": seen}))
    model = {key: value for key, value in config.items() if key != "text_cfg"}
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    with seeded():
        network = shaken(open_clip.CLIP(**model, text_cfg=text))
    save_file(network.state_dict(), path / "open_clip_model.safetensors")
    tokenizer.save_pretrained(path)
    return path


@cache
def hps() -> Path:
    """A folder with both published files of HPSv2, of an architecture that stands in architecture.json."""
    import open_clip

    path, config = folder("hps"), open_clip_config()
    (path / "architecture.json").write_text(json.dumps(config))
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        with seeded(seed):
            network = shaken(open_clip.CLIP(**config))
        torch.save({"epoch": 0, "state_dict": network.state_dict()}, path / name)
    return path


@cache
def image_reward() -> Path:
    """ImageReward.pt, med_config.json and the vocab.txt of its tokenizer in one folder: images of 32 pixels, 40 positions."""
    path = folder("image_reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    (path / "vocab.txt").write_text("\n".join(words))
    config = {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 40, "model_type": "bert", "num_attention_heads": 2,
        "num_hidden_layers": 2, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(words) + 2,
        "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    (path / "med_config.json").write_text(json.dumps(config))
    with seeded():
        torch.save(image_reward_state(config), path / "ImageReward.pt")
    return path


def image_reward_state(config: dict[str, Any], width: int = 128, depth: int = 2, patches: int = 4) -> dict[str, Tensor]:
    """Random tensors with the names of THUDM/ImageReward's file; a vision tower of two attention heads."""
    text, wide = config["hidden_size"], config["intermediate_size"]
    state = {
        "cls_token": drawn(1, 1, width), "pos_embed": drawn(1, patches + 1, width),
        **layer("patch_embed.proj", width, 3, 16, 16), **layer("norm", width),
    }  # fmt: skip
    for number in range(depth):
        block = f"blocks.{number}"
        state |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
        state |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
        state |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
    words = {
        "word_embeddings.weight": drawn(config["vocab_size"], text),
        "position_embeddings.weight": drawn(config["max_position_embeddings"], text),
        "position_ids": torch.arange(config["max_position_embeddings"])[None],
        **layer("LayerNorm", text),
    }
    encoder = {f"embeddings.{name}": tensor for name, tensor in words.items()}
    for number in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{number}"
        for kind, seen in (("attention", text), ("crossattention", width)):
            encoder |= layer(f"{block}.{kind}.self.query", text, text)
            encoder |= layer(f"{block}.{kind}.self.key", text, seen) | layer(f"{block}.{kind}.self.value", text, seen)
            encoder |= layer(f"{block}.{kind}.output.dense", text, text)
            encoder |= layer(f"{block}.{kind}.output.LayerNorm", text)
        encoder |= layer(f"{block}.intermediate.dense", wide, text) | layer(f"{block}.output.dense", text, wide)
        encoder |= layer(f"{block}.output.LayerNorm", text)
    return {
        **{f"blip.visual_encoder.{name}": tensor for name, tensor in state.items()},
        **{f"blip.text_encoder.{name}": tensor for name, tensor in encoder.items()},
        **layer("blip.vision_proj", 256, width), **layer("blip.text_proj", 256, text),
        **head_state(AESTHETIC["linear"], text, "mlp.layers."),
    }  # fmt: skip


def layer(name: str, *shape: int) -> dict[str, Tensor]:
    """Weight and bias of a layer; of one size only, of a norm, around 1 and 0."""
    weight = drawn(*shape) if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)
    return {f"{name}.weight": weight, f"{name}.bias": 0.1 * torch.randn(shape[0])}


def drawn(*shape: int) -> Tensor:
    """N(0, 1 / inputs), which keeps the size of what passes."""
    return torch.randn(shape) * max(1, torch.Size(shape[1:]).numel()) ** -0.5


def shaken(network: nn.Module) -> nn.Module:
    """With noise on all matrices: at the start many are so small that images and prompts hardly matter."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn_like(parameter) * torch.Size(parameter.shape[1:]).numel() ** -0.5
    return network
