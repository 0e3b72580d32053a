"""Rewards for tests: a plain callable as a reward, and batches of random images."""

import torch

from rewards import RewardBatch, RewardOutput, RewardSpec


class Plain:
    """A reward whose answer a test supplies: called with the batch, it returns a RewardOutput, raises or hangs."""

    name = "plain"

    def __init__(self, answer, spec=None):
        self.answer = answer
        self.spec = spec or RewardSpec()
        self.seen = []

    def __call__(self, batch):
        self.seen.append(batch)
        return self.answer(batch)

    def load(self): ...

    def close(self): ...


def brightness(batch):
    scores = batch.images.mean(dim=(1, 2, 3))
    return RewardOutput(scores, torch.ones(len(batch), dtype=torch.bool), {"red": batch.images[:, 0].mean(dim=(1, 2))})


def fixed(scores, valid=None, **parts):
    scores = torch.tensor(scores)
    valid = torch.ones(len(scores), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Plain(lambda batch: RewardOutput(scores, valid, {key: torch.tensor(part) for key, part in parts.items()}))


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    return RewardBatch(prompts=[f"p{i}" for i in range(count)], images=images)
