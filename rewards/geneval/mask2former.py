"""Mask2Former (2112.01527) as GenEval's detector, from a checkpoint of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rewards.geneval.detections import Detections
from rewards.geneval.logic import THRESHOLD

RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEAD = ("class_predictor.weight", "class_predictor.bias")
INSTANCES = 100  # of a picture, the best pairs of query and class


@dataclass
class Mask2Former:
    """Objects with masks, one picture after the other.

    checkpoint: a folder or hub id of a Mask2FormerForUniversalSegmentation for COCO instances. The default is Swin-S, as GenEval's;
    GenEval itself loads the weights of mmdet, so results are GenEval-like. short_side, long_side: pixels to which the picture is
    enlarged or reduced (bilinear), and the longer side's limit: those of mmdet's test. device: None is a GPU if there is one.

    Score: class probability times the mean probability of the mask's pixels. Instances at or below GenEval's lowest threshold, and
    empty masks, are left out. About 70 M parameters. ValueError for a checkpoint with missing or unknown weights, or whose class
    numbers are not those asked for."""

    checkpoint: str = "facebook/mask2former-swin-small-coco-instance"
    short_side: int = 800
    long_side: int = 1333
    device: str | None = None
    _body: Any = field(default=None, init=False, repr=False)
    _head: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.short_side <= self.long_side:
            raise ValueError(
                f"got short_side={self.short_side}, long_side={self.long_side}; expected 0 < short_side <= long_side"
            )

    def load(self) -> None:
        if self._body is not None:
            return
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._body, self._head = (part.requires_grad_(False).eval().to(device) for part in _network(self.checkpoint))

    def close(self) -> None:
        self._body = self._head = None

    def detect(self, images: Tensor, classes: Sequence[str]) -> list[Detections]:
        self.load()
        check_classes(self._body.config.id2label, classes)
        return [self._one(image) for image in images]

    @torch.no_grad()
    def _one(self, image: Tensor) -> Detections:
        size = image.shape[-2:]
        shown = self._prepared(image)
        rows, columns = shown.shape[-2:]
        padded = pad(shown, (0, -columns % 32, 0, -rows % 32))
        answer = self._body(pixel_values=padded[None], output_hidden_states=True)
        classes = self._head(answer.transformer_decoder_intermediate_states[-1][:, 0])  # of the last layer: [Q, 1, D]
        masks = interpolate(answer.masks_queries_logits[-1], padded.shape[-2:], mode="bilinear", align_corners=False)
        masks = interpolate(masks[..., :rows, :columns], size, mode="bilinear", align_corners=False)
        return instances(classes, masks[0])

    def _prepared(self, image: Tensor) -> Tensor:
        """[3, h, w] of a uint8 image [3, H, W]: resized, with ImageNet's mean 0 and deviation 1, on the model's device."""
        height, width = image.shape[-2:]
        factor = min(self.short_side / min(height, width), self.long_side / max(height, width))
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        pixels = image.to(self._body.device).float()[None] / 255
        resized = interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return (resized - mean) / std


def _network(checkpoint: str) -> tuple[Any, Any]:
    """The network and its class head. Both are those of Mask2FormerForUniversalSegmentation, which itself needs scipy for its loss."""
    from safetensors import safe_open
    from transformers import Mask2FormerModel
    from transformers.utils import cached_file

    body, report = Mask2FormerModel.from_pretrained(checkpoint, output_loading_info=True, use_safetensors=True)
    missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    unknown = sorted(set(report["unexpected_keys"]) - {*HEAD, "criterion.empty_weight"})
    with safe_open(cached_file(checkpoint, "model.safetensors"), "pt") as file:
        kept = set(file.keys())
        missing += [key for key in HEAD if key not in kept]
        if missing or unknown:
            raise ValueError(
                f"got {checkpoint!r} without {missing}, with {unknown}; expected the weights of its model, all and only"
            )
        weight, bias = (file.get_tensor(key).float() for key in HEAD)
    head = torch.nn.Linear(body.config.hidden_dim, body.config.num_labels + 1)
    head.load_state_dict({"weight": weight, "bias": bias})
    return body, head


def instances(classes: Tensor, masks: Tensor) -> Detections:
    """The instances of one picture from the logits of Q queries: classes [Q, C + 1], the last one for no object, and masks
    [Q, H, W]. A query may give several, one per class."""
    probability = classes.softmax(1)[:, :-1]
    best = probability.flatten().topk(min(INSTANCES, probability.numel()))
    query, label = best.indices // probability.shape[1], best.indices % probability.shape[1]
    inside = masks > 0
    sure = (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)  # 0 for an empty mask
    scores = best.values * sure[query]
    keep = scores > THRESHOLD
    query, label, scores = query[keep], label[keep], scores[keep]
    boxes = [_box(inside[number]) for number in query.tolist()]
    return Detections(torch.tensor(boxes).reshape(-1, 4), scores.cpu(), label.cpu(), inside[query].cpu())


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 around a mask [H, W] that is not empty."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def check_classes(names: dict[int, str], classes: Sequence[str]) -> None:
    """ValueError if the model has another number of classes, or a class under another number. Names only one of both knows
    (couch, sofa) are passed over, if they are fewer than half."""
    known = {number: RENAMED.get(name, name) for number, name in names.items()}
    shared = {number: name for number, name in known.items() if name in classes}
    moved = {number: name for number, name in shared.items() if classes[number] != name}
    if len(known) != len(classes) or moved or 2 * len(shared) < len(classes):
        raise ValueError(
            f"got a model of {len(known)} classes, {len(shared)} of them known by name, other numbers for {moved}; expected the "
            f"{len(classes)} of COCO instances in the order of detectors"
        )
