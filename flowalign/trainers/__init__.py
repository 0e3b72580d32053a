"""Trainers: prepare, collect, updates. One file per kind of trainer."""

from flowalign.trainers.base import AdamW, Rollout, Task, Trainer, Update
from flowalign.trainers.policy_gradient import PolicyGradient

__all__ = ["AdamW", "PolicyGradient", "Rollout", "Task", "Trainer", "Update"]
