"""Trainers. base: the contract; one file per kind of trainer (policy_gradient), and what they are made of (signal,
update_engine, edge_update, state_update, dry_run, calibration, teachers, visits). A method is a configuration of one of them."""

from flowalign.trainers.base import AdamWConfig, Batch, Setup, Trainer, Update, UpdateForecast
from flowalign.trainers.calibration import Calibration, GainBalance
from flowalign.trainers.cold_start import ColdStart
from flowalign.trainers.distillation import Distillation
from flowalign.trainers.policy_gradient import PolicyGradient, as_policy_gradient, uncalibrated
from flowalign.trainers.signal import Signal
from flowalign.trainers.teachers import Anchor, Route, Teacher
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine

__all__ = [
    "AdamWConfig", "Anchor", "Batch", "Calibration", "ColdStart", "Distillation", "GainBalance", "Measures", "Part", "PolicyGradient", "Route", "Setup", "Signal", "States",
    "Teacher", "TrainedRole", "Trainer", "Update", "UpdateEngine", "UpdateForecast", "as_policy_gradient", "uncalibrated",
]  # fmt: skip
