"""The learning rate of the trainings of Glyphs networks."""

import math

import torch


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, end: int, warmup: int) -> None:
    """Linear warm-up over `warmup` steps to `peak`, times a cosine that is 0 at step `end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / end)))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / warmup) * cosine
