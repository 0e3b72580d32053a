"""Trainers. base: the contract; one file per kind of trainer (policy_gradient), and what they are made of (signal, dry_run).
A method is a configuration of one of them."""

from flowalign.trainers.base import AdamWConfig, Batch, Trainer, Update, UpdateForecast
from flowalign.trainers.policy_gradient import PolicyGradient, as_policy_gradient
from flowalign.trainers.signal import Signal

__all__ = [
    "AdamWConfig",
    "Batch",
    "PolicyGradient",
    "Signal",
    "Trainer",
    "Update",
    "UpdateForecast",
    "as_policy_gradient",
]
