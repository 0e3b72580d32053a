"""A CLIP of transformers or of open_clip as one thing: unit vectors of pixels and of prompts, and their cosine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rewards.image.checkpoints import pretrained, pretrained_network
from rewards.image.preprocess import Preprocess
from rewards.image.scorer import at_least_fp32, frozen, unit

FITS = {"shortest": "crop", "longest": "pad", "squash": "squash"}  # open_clip's resize_mode -> ours
CONFIG = "open_clip_config.json"
GLYPHS = Path(__file__).parent / "glyphs_clip"  # made by scripts/train_glyphs_clip.py
KEPT = 64  # batches whose text vectors are kept: with 32 prompts of 1,024 numbers each, 8 MiB


@dataclass(frozen=True, eq=False)
class Clip:
    """Two towers into one space. images: pixels [n, 3, S, S] -> [n, D]; texts: n prompts -> [n, D]; scale: exp(logit_scale).

    `cosine` keeps the vectors of the last texts, without gradient: noise optimization asks for the same prompt at every step."""

    network: nn.Module
    preprocess: Preprocess
    images: Callable[[Tensor], Tensor]
    texts: Callable[[list[str]], Tensor]
    scale: float
    _kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """[n] in [-1, 1]: row by row, so no sample sees another's prompt; fp32 at least."""
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self._unit_texts(list(rows), pixels.device)
        return (unit(self.images(pixels)) * texts[[rows[prompt] for prompt in prompts]]).sum(1)

    def _unit_texts(self, prompts: list[str], device: torch.device) -> Tensor:
        """[n, D] of n different prompts. Kept by the list, not by the prompt: a vector rounds by the batch in which it is made,
        so a score would depend on earlier calls, and a resumed run would differ."""
        key = (*prompts, device)
        if (found := self._kept.get(key)) is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():  # also to be used where gradients are on
            made = unit(self.texts(prompts))
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = made
        return made


def load_clip(model: str, tokenizer: str | None, dtype: torch.dtype) -> Clip:
    """`hf-hub:owner/name` and `local-dir:folder` are open_clip's, as is a folder that holds its configuration and not one
    of transformers; any other hub id or folder is read by transformers. "glyphs" is the folder that comes with this package.
    tokenizer: from another place than the model."""
    folder = GLYPHS if model == "glyphs" else Path(model).expanduser()
    if folder.is_dir() and (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        return load_open_clip(f"local-dir:{folder}", tokenizer, dtype)
    if model.startswith(("hf-hub:", "local-dir:")):
        return load_open_clip(model, tokenizer, dtype)
    return load_transformers_clip(model, tokenizer, dtype)


def load_transformers_clip(model: str, tokenizer_place: str | None, dtype: torch.dtype) -> Clip:
    """Texts are padded and cut to the network's number of positions (77); the end token is kept."""
    from transformers import CLIPModel, CLIPTokenizer

    network = pretrained_network(CLIPModel, "model", model, at_least_fp32(dtype))
    source = "model" if tokenizer_place is None else "tokenizer"
    tokenizer = pretrained(CLIPTokenizer, source, tokenizer_place or model)
    text, vision = network.config.text_config, network.config.vision_config
    if len(tokenizer) != text.vocab_size:
        raise ValueError(
            f"got {source}={tokenizer_place or model!r}, a tokenizer of {len(tokenizer)} tokens; expected {text.vocab_size}, the "
            "vocabulary of the network"
        )
    scale = float(network.logit_scale.detach().double().exp())  # before the weights are rounded to dtype
    frozen(network, dtype)

    # the towers' parts, since get_image_features returns a tensor in transformers 4 and an object in 5
    def images(pixels: Tensor) -> Tensor:
        return cast(Tensor, network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))

    def texts(prompts: list[str]) -> Tensor:
        length = text.max_position_embeddings
        ids = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return cast(Tensor, network.text_projection(network.text_model(ids.to(network.device)).pooler_output))

    return Clip(network, Preprocess(vision.image_size, crop_offset="floor"), images, texts, scale)


def load_open_clip(name: str, tokenizer_place: str | None, dtype: torch.dtype) -> Clip:
    """Activation, image size and normalization come with the weights, from open_clip_config.json."""
    import open_clip

    try:
        network = open_clip.create_model(name, require_pretrained=True)
        if tokenizer_place is None:
            tokenizer = open_clip.get_tokenizer(name)
        else:
            tokenizer = open_clip.tokenizer.HFTokenizer(os.path.expanduser(tokenizer_place))
        config = open_clip.get_model_preprocess_cfg(network)
    except (OSError, RuntimeError, ValueError) as error:
        place = name.partition(":")[2]
        raise ValueError(
            f"got model={name!r}, which open_clip cannot load ({error}); expected {CONFIG}, weights and a tokenizer: "
            f"`hf download {place}` on a machine with a network, then set model to `local-dir:` and the folder"
        ) from error
    return clip_of(network, tokenizer, _preprocess(name, config), dtype)


def clip_of(network: Any, tokenizer: Any, preprocess: Preprocess, dtype: torch.dtype) -> Clip:
    """From open_clip's parts."""
    length, scale = network.context_length, float(network.logit_scale.detach().double().exp())
    frozen(network, dtype)

    def texts(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, context_length=length)
        return cast(Tensor, network.encode_text(tokens.to(network.logit_scale.device)))

    return Clip(network, preprocess, network.encode_image, texts, scale)


def _preprocess(name: str, config: dict[str, Any]) -> Preprocess:
    size, interpolation, fit = config["size"], config["interpolation"], config["resize_mode"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1 or interpolation not in ("bicubic", "bilinear") or fit not in FITS:
        raise ValueError(
            f"got model={name!r} with size {size}, interpolation {interpolation!r} and resize_mode {fit!r}; expected a square "
            f"size, 'bicubic' or 'bilinear', and one of {tuple(FITS)}"
        )
    mean, std = tuple(config["mean"]), tuple(config["std"])
    fill = config["fill_color"] / 255
    return Preprocess(sides.pop(), cast(Any, FITS[fit]), "round", interpolation, fill, mean, std)
