"""RLIR (2509.23958): does a generated video show the actions that it was generated from?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rewards.base import RewardBatch, RewardOutput, RewardSpec


class InverseDynamicsModel(Protocol):
    """A frozen network that tells from frames which action led from each to the next."""

    def logits(self, videos: Tensor) -> list[Tensor]:
        """Of RGB videos [n, F, 3, H, W] in [0, 1] one tensor [n, F - 1, K] per axis of the actions (mostly one), each with
        its own K. A row depends on its own video only."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class InverseDynamics:
    """Share of the actions a_1 … a_n that an inverse dynamics model recovers: R = (1/n) Σ 1[â_i = a_i], in [0, 1] (2509.23958).

    model: an InverseDynamicsModel of your own, frozen. fps: the frames per second that it was trained on; of a video of k times
    as many it sees every k-th frame, and any other rate is an error. None: all frames at any rate. size: the (height, width)
    that it was trained on, by bilinear antialiased resizing; None leaves the frames as they are.

    metadata[key]: the n = F - 1 actions between the F frames that the model sees, each the number of a class, or a list of one
    per axis. axes: the names of the axes, each with the names of its classes in the order of the logits, by which an action may
    be named too; [] if they have none: {"keys": ["none", "forward"], "camera": []}. A sample without actions, with another
    number of them, or with a class that the model does not have, has no score.

    Our reading, where our sources are silent: of several axes the mean of their shares, the resizing, and both options.
    balanced: the mean over the classes of a sample's actions of the share recovered of each, so that an action which fills most
    of the video counts no more than a rare one. soft: the probability of a_i in place of 1[â_i = a_i]; differentiable.
    Components: accuracy/<axis>, the plain share. Not kept: a guard against videos that only this model reads; measure with
    another one under `evaluation.rewards`."""

    model: InverseDynamicsModel
    fps: float | None = None
    size: tuple[int, int] | None = None
    key: str = "actions"
    axes: dict[str, list[str]] = field(default_factory=lambda: {"action": []})
    balanced: bool = False
    soft: bool = False
    batch_size: int = 8
    name: str = "inverse_dynamics"

    def __post_init__(self) -> None:
        if (self.fps is not None and not self.fps > 0) or (self.size is not None and min(self.size) < 1):
            raise ValueError(f"got fps={self.fps}, size={self.size}; expected numbers above 0, or None")
        if self.batch_size < 1:
            raise ValueError(f"got batch_size={self.batch_size}; expected at least 1")
        if not self.axes or any(len(set(names)) < len(names) for names in self.axes.values()):
            raise ValueError(f"got axes={self.axes}; expected at least one, each with different names of its classes")

    @property
    def spec(self) -> RewardSpec:
        """Differentiable if `soft`, where the model is."""
        return RewardSpec(
            ("videos",), differentiable=self.soft, range=(0, 1), licence="code flowalign's own; weights: your model's"
        )

    def load(self) -> None:
        self.model.load()

    def close(self) -> None:
        self.model.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.videos is not None and batch.fps is not None
        frames = self._frames(batch.videos, batch.fps)
        given = [self._actions(metadata, frames.shape[1] - 1) for metadata in batch.metadata]
        info = [actions if isinstance(actions, str) else "" for actions in given]
        known = [(row, actions) for row, actions in enumerate(given) if not isinstance(actions, str)]
        scores = [frames.new_tensor(torch.nan)] * len(batch)
        accuracy = torch.full((len(batch), len(self.axes)), torch.nan)
        for first in range(0, len(known), self.batch_size):
            part = known[first : first + self.batch_size]
            logits = self._logits(frames[[row for row, _ in part]])
            for place, (row, actions) in enumerate(part):
                answer = self._compare([axis[place] for axis in logits], actions)
                if isinstance(answer, str):
                    info[row] = answer
                else:
                    scores[row], accuracy[row] = answer
        result = torch.stack(scores) if scores else frames.new_zeros(0)
        parts = {f"accuracy/{axis}": accuracy[:, place] for place, axis in enumerate(self.axes)}
        result = result if torch.is_grad_enabled() else result.float()
        return RewardOutput(result, ~result.isnan(), parts, info)

    def _frames(self, videos: Tensor, fps: float) -> Tensor:
        """What the model sees of videos [N, F, 3, H, W]; ValueError for a frame rate that is not a multiple of its own."""
        if self.fps is not None:
            every = round(fps / self.fps)
            if every < 1 or abs(every * self.fps - fps) > 1e-3 * fps:
                raise ValueError(
                    f"got videos of {fps:g} fps; expected {self.fps:g}, those of the inverse dynamics model, or a multiple: "
                    "generate at its rate, or take a model that was trained on yours"
                )
            videos = videos[:, ::every]
        if self.size is None or tuple(videos.shape[-2:]) == tuple(self.size):
            return videos
        resized = interpolate(videos.flatten(0, 1), self.size, mode="bilinear", antialias=True, align_corners=False)
        return resized.unflatten(0, videos.shape[:2])

    def _actions(self, metadata: dict[str, Any], steps: int) -> list[list[int]] | str:
        """[steps][axes] class numbers, or why there are none."""
        given = metadata.get(self.key)
        if not isinstance(given, (list, tuple)):
            return f"metadata[{self.key!r}] is {given!r}; expected a list of {steps} actions"
        if len(given) != steps or steps == 0:
            return (
                f"got {len(given)} actions for {steps + 1} frames, as the model sees the video; expected {steps}, one between "
                "each frame and the next"
            )
        rows = [list(step) if isinstance(step, (list, tuple)) else [step] for step in given]
        for number, row in enumerate(rows):
            if len(row) != len(self.axes):
                return f"got action {number} as {given[number]!r}; expected one class for each of {list(self.axes)}"
            for place, names in enumerate(self.axes.values()):
                if row[place] in names:
                    row[place] = names.index(row[place])
                if type(row[place]) is not int or row[place] < 0:
                    return (
                        f"got action {number} as {given[number]!r}; expected the number of a class, or one of {names}"
                    )
        return rows

    def _logits(self, videos: Tensor) -> list[Tensor]:
        """The model's answer, one tensor [n, F - 1, K] per axis; ValueError for another form."""
        logits = self.model.logits(videos)
        shapes = [tuple(axis.shape) for axis in logits]
        wanted = (len(videos), videos.shape[1] - 1)
        fits = len(shapes) == len(self.axes) and all(len(shape) == 3 and shape[:2] == wanted for shape in shapes)
        if not fits or any(
            names and len(names) != shape[2] for names, shape in zip(self.axes.values(), shapes, strict=True)
        ):
            raise ValueError(
                f"got logits of shapes {shapes} from {type(self.model).__name__}; expected {wanted} and the number of classes "
                f"for each of the axes {self.axes}"
            )
        return logits

    def _compare(self, logits: list[Tensor], actions: list[list[int]]) -> tuple[Tensor, Tensor] | str:
        """Of one sample, of logits [F - 1, K] per axis: its score, and the accuracy [A]. A text: why there are none."""
        shares, accuracy = [], []
        for axis, own, classes in zip(self.axes, logits, zip(*actions, strict=True), strict=True):
            if max(classes) >= own.shape[1]:
                return f"got the class {max(classes)} of {axis!r}; expected less than {own.shape[1]}, the classes of the model"
            if not bool(own.isfinite().all()):
                return f"the model's logits of {axis!r} are not finite"
            asked = torch.tensor(classes, device=own.device)
            found = (own.argmax(1) == asked).to(own.dtype)
            value = own.softmax(1).gather(1, asked[:, None])[:, 0] if self.soft else found
            weight = 1 / asked.bincount()[asked].to(own.dtype) if self.balanced else torch.ones_like(found)
            shares.append((weight * value).sum() / weight.sum())  # balanced: the weights of a class sum to 1
            accuracy.append(found.mean())
        return torch.stack(shares).mean(), torch.stack(accuracy).detach().float().cpu()
