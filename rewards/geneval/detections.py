"""What looks at the pictures for GenEval: contracts of a detector and of a color classifier, and what they answer with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Detections:
    """k objects of one picture. boxes [k, 4]: x0, y0, x1, y1 in pixels; scores [k] in [0, 1]; labels [k]: number of the class;
    masks [k, H, W]: bool, or None from a detector of boxes. ValueError for other shapes, or a box turned inside out."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.boxes)
        shapes = {"boxes": [count, 4], "scores": [count], "labels": [count]}
        got = {name: list(vars(self)[name].shape) for name in shapes}
        if got != shapes or (self.masks is not None and (len(self.masks) != count or self.masks.ndim != 3)):
            raise ValueError(f"got detections {got}; expected {shapes} and masks [{count}, H, W] or none")
        if bool((self.boxes[:, :2] > self.boxes[:, 2:]).any()):
            raise ValueError("got a box with x0 > x1 or y0 > y1; expected x0, y0, x1, y1")


class Detector(Protocol):
    @property
    def checkpoint(self) -> str:
        """The weights it loads, hub id or path; "" for none."""
        ...

    def detect(self, images: Tensor, classes: Sequence[str]) -> list[Detections]:
        """What it finds in uint8 RGB images [N, 3, H, W], one Detections per image, unfiltered: thresholds are GenEval's. Labels
        count in `classes`."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...


class ColorClassifier(Protocol):
    @property
    def checkpoint(self) -> str:
        """The weights it loads, hub id or path; "" for none."""
        ...

    def classify(
        self, image: Tensor, boxes: Tensor, masks: Tensor | None, name: str, colors: Sequence[str]
    ) -> list[str]:
        """The color, of `colors`, of each of k objects of class `name` at boxes [k, 4] (masks [k, H, W]) in the uint8 RGB image
        [3, H, W]."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...
