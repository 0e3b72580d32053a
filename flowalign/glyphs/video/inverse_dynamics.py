"""Two inverse dynamics models of Glyphs-Video: the direction in which a clip's word moves between each frame and the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu

from flowalign.glyphs.video.prompts import DIRECTIONS

Weights = Literal["reward", "held_out"]
FEW = 0.02  # deviation of pixels in [0, 1] below which a pair of frames is not made stronger
REACH = 3  # pixels along each axis: shifts that the correlation is asked for
FEATURES = 12


class FramePairs(nn.Module):
    """A small convolutional network on each pair of neighboring frames: their mean and their difference. Pooling over the
    picture makes it blind to where the word is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 24, 5, stride=2, padding=2)
        self.second = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.third = nn.Conv2d(40, 64, 3, padding=1)
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, len(DIRECTIONS))

    def forward(self, videos: Tensor) -> Tensor:
        """Logits [n, F - 1, 4] of videos [n, F, 3, H, W] in [0, 1]."""
        pairs = torch.stack([videos[:, :-1], videos[:, 1:]], 2).flatten(0, 1)  # [n · (F - 1), 2, 3, H, W]
        pairs = pairs - pairs.mean((1, 3, 4), keepdim=True)
        pairs = pairs / (pairs.square().mean((1, 2, 3, 4), keepdim=True) + FEW**2).sqrt()
        seen = torch.cat([pairs.mean(1), pairs[:, 1] - pairs[:, 0]], 1)
        for layer in (self.first, self.second, self.third):
            seen = silu(layer(seen))
        logits: Tensor = self.out(silu(self.hidden(seen.mean((2, 3)))))
        return logits.unflatten(0, (len(videos), -1))


class ShiftedFeatures(nn.Module):
    """The correlation of the features of neighboring frames at each shift of up to REACH pixels, and a small head on it: what
    it says follows from which shift fits best. The correlation is circular; a word is nowhere near both edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, FEATURES, 5, padding=2)
        self.second = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.hidden, self.out = nn.Linear((2 * REACH + 1) ** 2, 48), nn.Linear(48, len(DIRECTIONS))

    def forward(self, videos: Tensor) -> Tensor:
        """Logits [n, F - 1, 4] of videos [n, F, 3, H, W] in [0, 1]."""
        frames = (videos - videos.mean((-2, -1), keepdim=True)).flatten(0, 1)
        features = self.second(silu(self.first(frames)))
        features = (features - features.mean((-2, -1), keepdim=True)).unflatten(0, videos.shape[:2])
        spectra = torch.fft.rfft2(features)
        cross = (spectra[:, :-1].conj() * spectra[:, 1:]).sum(2)  # Σ_p f_t(p) f_{t+1}(p + shift)
        shifts = torch.fft.irfft2(cross, s=features.shape[-2:]).roll((REACH, REACH), (-2, -1))
        power = features.square().sum((2, 3, 4))
        cosine = shifts[..., : 2 * REACH + 1, : 2 * REACH + 1].flatten(-2) / (
            (power[:, :-1] * power[:, 1:]).sqrt()[..., None] + 1e-4
        )
        logits: Tensor = self.out(silu(self.hidden(4 * cosine)))
        return logits


NETWORKS: Final[dict[Weights, type[FramePairs] | type[ShiftedFeatures]]] = {
    "reward": FramePairs, "held_out": ShiftedFeatures,
}  # fmt: skip


@dataclass(eq=False)
class GlyphsInverseDynamics:
    """An inverse dynamics model of Glyphs-Video, for rewards.InverseDynamics (RLIR 2509.23958): classes left, right, up, down, the order of
    DIRECTIONS.

    weights: "reward" (FramePairs, 39,828 numbers), to train on, or "held_out" (ShiftedFeatures, 4,816), to measure with: another
    architecture, another seed, other walks and other degradations of the clips, so that what only one of them reads is doubtful. Both are
    trained by scripts/train_inverse_dynamics.py, on rendered clips alone; docs/results/glyphs_inverse_dynamics.md has their accuracies. A
    step is judged by its own two frames. Where nothing moves, all classes are about as probable. Differentiable.
    Not kept: how far a word moves; half a step in a direction counts as a whole one, and so may any change of the frame that looks like it:
    look at the held-out model, at MotionBand and at what can be read."""

    weights: Weights = "reward"
    _network: FramePairs | ShiftedFeatures | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.weights not in NETWORKS:
            raise ValueError(f"got weights={self.weights!r}; expected one of {list(NETWORKS)}")

    def load(self) -> None:
        if self._network is None:
            self._network = read_weights(self.weights, weights_file(self.weights))

    def close(self) -> None:
        self._network = None

    def logits(self, videos: Tensor) -> list[Tensor]:
        """[n, F - 1, 4] of videos [n, F, 3, H, W] in [0, 1]."""
        self.load()
        assert self._network is not None
        return [self._network.to(videos.device)(videos.float())]


def weights_file(weights: Weights) -> Path:
    return Path(__file__).with_name(f"inverse_dynamics_{weights}.safetensors")


def read_weights(weights: Weights, path: Path) -> FramePairs | ShiftedFeatures:
    """The network of a file, in fp32 without gradients of its own."""
    network = NETWORKS[weights]()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.eval().requires_grad_(False)
