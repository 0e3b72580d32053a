"""A reward for tests of rewards in other processes: it reads floats, and a prompt tells it what else to do."""

import threading
import time
from dataclasses import dataclass
from functools import cache

import torch

from rewards import JPEGCompressibility, RewardBatch, RewardOutput, RewardSpec
from rewards.remote.server import Listener, Service


@dataclass
class Spread:
    """The standard deviation of each picture times `scale`; `skip` in a prompt: no score, `nan`: a NaN that it calls valid."""

    scale: float = 1.0
    seconds: float = 0.0
    name: str = "spread"
    spec = RewardSpec(range=(0, 10))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        time.sleep(self.seconds)
        assert batch.images is not None
        if any("raise" in prompt for prompt in batch.prompts):
            raise OSError("no weights here")
        if any("chat" in prompt for prompt in batch.prompts):
            print("a reward that chats on stdout does no harm", flush=True)
        scores = self.scale * batch.images.flatten(1).std(1)
        scores[[i for i, prompt in enumerate(batch.prompts) if "nan" in prompt]] = torch.nan
        valid = torch.tensor(["skip" not in prompt for prompt in batch.prompts], dtype=torch.bool)
        parts = {"red": batch.images[:, 0].mean((1, 2)), "length": torch.tensor([float(len(p)) for p in batch.prompts])}
        return RewardOutput(
            scores, valid, parts, [f"saw {prompt!r}" for prompt in batch.prompts], 0.0, scores.abs() / 7
        )


def mixed_batch(count: int = 6, seed: int = 0) -> RewardBatch:
    """Random pictures, some of which are k/255, with prompts for a skip and a NaN, and metadata."""
    images = torch.rand(count, 3, 12, 8, generator=torch.Generator().manual_seed(seed))
    images[0] = (images[0] * 255).round() / 255
    names = ["plain", "skip", "nan", "ünï", 'a "quoted" one', ""]
    return RewardBatch(
        prompts=[names[i % len(names)] for i in range(count)],
        images=images,
        metadata=[{"target": "A", "box": [1, 2.5, None], "of": {"deep": [True]}} for _ in range(count)],
        sample_ids=[7 * i for i in range(count)],
        group_ids=[i // 2 for i in range(count)],
    )


def same(ours: RewardOutput, other: RewardOutput) -> None:
    """Bit for bit, but for the time it took."""
    pairs = [(ours.scores, other.scores), (ours.uncertainty, other.uncertainty), (ours.valid, other.valid)]
    assert ours.components.keys() == other.components.keys()
    pairs += [(ours.components[name], other.components[name]) for name in ours.components]
    for left, right in pairs:
        assert left is not None and right is not None and left.dtype == right.dtype and left.shape == right.shape
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    assert (ours.info, ours.channels) == (other.info, other.channels)


@cache
def jpeg_server() -> str:
    """The address of a server of JPEGCompressibility, which ends with the process."""
    listener = Listener(Service(JPEGCompressibility()))
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    return listener.url
