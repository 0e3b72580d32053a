"""CLIP as GenEval's zero-shot color classifier, by open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 0x99  # what is painted over the pixels outside an object's mask


@dataclass
class CLIPColors:
    """The color whose texts lie nearest: three templates with the color and the class, their unit embeddings averaged per color.

    The object is cut out by its box, with gray (#999) outside its mask, then resized as CLIP does. model, pretrained: of
    open_clip; pretrained may be a file. The defaults are GenEval's ViT-L-14 of OpenAI, trained with QuickGELU: that is
    "ViT-L-14-quickgelu" since open_clip 3, whose "ViT-L-14" has GELU. device: None is a GPU if there is one. About 0.43 B
    parameters. Texts are embedded once per class until `close`. ValueError, by `load`, for a model with another activation
    than its weights were trained with."""

    model: str = "ViT-L-14-quickgelu"
    pretrained: str = "openai"
    device: str | None = None
    _loaded: Any = field(default=None, init=False, repr=False)
    _texts: dict[tuple[str, tuple[str, ...]], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def checkpoint(self) -> str:
        """Of open_clip."""
        return f"{self.model} {self.pretrained}"

    def load(self) -> None:
        if self._loaded is not None:
            return
        import open_clip

        weights, config = (
            open_clip.get_pretrained_cfg(self.model, self.pretrained),
            open_clip.get_model_config(self.model),
        )
        if weights and config and weights.get("quick_gelu", False) != config.get("quick_gelu", False):
            raise ValueError(
                f"got model={self.model!r} with pretrained={self.pretrained!r}, trained with another activation; expected that "
                "of the weights: add '-quickgelu' to the model, or take it off"
            )
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        clip, _, transform = open_clip.create_model_and_transforms(
            self.model, pretrained=self.pretrained, device=device
        )
        self._loaded = clip.requires_grad_(False).eval(), transform, open_clip.get_tokenizer(self.model), device

    def close(self) -> None:
        self._loaded = None
        self._texts.clear()

    @torch.no_grad()
    def classify(
        self, image: Tensor, boxes: Tensor, masks: Tensor | None, name: str, colors: Sequence[str]
    ) -> list[str]:
        if not len(boxes):
            return []
        self.load()
        clip, transform, _, device = self._loaded
        crops = cut_out(image, boxes, masks)
        seen = normalize(
            clip.encode_image(torch.stack([transform(_picture(crop)) for crop in crops]).to(device)), dim=-1
        )
        return [colors[number] for number in (seen @ self._text(name, tuple(colors)).T).argmax(1).tolist()]

    def _text(self, name: str, colors: tuple[str, ...]) -> Tensor:
        """[colors, D]: the unit vector of each color of a class."""
        clip, _, tokenizer, device = self._loaded
        key = (name, colors)
        if key not in self._texts:
            texts = [text.format(color=color, name=name) for color in colors for text in TEMPLATES]
            unit = normalize(clip.encode_text(tokenizer(texts).to(device)), dim=-1)
            self._texts[key] = normalize(unit.reshape(len(colors), len(TEMPLATES), -1).mean(1), dim=-1)
        return self._texts[key]


def cut_out(image: Tensor, boxes: Tensor, masks: Tensor | None) -> list[Tensor]:
    """A uint8 crop [3, h, w] of the image [3, H, W] per box, rounded to whole pixels and at least one, gray outside its mask."""
    height, width = image.shape[-2:]
    crops = []
    for row, box in enumerate(boxes.round().long().tolist()):
        left, top = min(max(box[0], 0), width - 1), min(max(box[1], 0), height - 1)
        right, bottom = min(max(box[2], left + 1), width), min(max(box[3], top + 1), height)
        shown = image if masks is None else torch.where(masks[row].to(image.device), image, BACKGROUND)
        crops.append(shown[:, top:bottom, left:right])
    return crops


def _picture(crop: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(crop.permute(1, 2, 0).cpu().numpy())
