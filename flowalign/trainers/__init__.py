"""Trainers. base: the contract; one file per kind of trainer (policy_gradient, forward_process,
distillation), and what they are made of (signal,
update_engine, edge_update, state_update, pull_update, dry_run, calibration, teachers, visits). A method is a configuration of one of them."""

from flowalign.trainers.base import AdamWConfig, Batch, Setup, Trainer, Update, UpdateForecast
from flowalign.trainers.calibration import Calibration, GainBalance
from flowalign.trainers.cold_start import ColdStart
from flowalign.trainers.distillation import Distillation
from flowalign.trainers.forward_process import ForwardProcess
from flowalign.trainers.policy_gradient import PolicyGradient, as_policy_gradient, uncalibrated
from flowalign.trainers.samples import FromRollout, Places, Samples, SampleSource
from flowalign.trainers.signal import Signal
from flowalign.trainers.teachers import ManifoldAnchor, Route, Teacher
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine

__all__ = [
    "AdamWConfig", "Batch", "Calibration", "ColdStart", "Distillation", "ForwardProcess", "FromRollout", "GainBalance", "ManifoldAnchor", "Measures", "Part", "Places", "PolicyGradient", "Route", "SampleSource",
    "Samples", "Setup", "Signal", "States",
    "Teacher", "TrainedRole", "Trainer", "Update", "UpdateEngine", "UpdateForecast", "as_policy_gradient", "uncalibrated",
]  # fmt: skip
