<<<<<<< HEAD
"""Trainers. base: the contract; one file per kind of trainer (policy_gradient, forward_process,
distillation), and what they are made of (signal,
update_engine, edge_update, state_update, pull_update, dry_run, calibration, teachers, visits). A method is a configuration of one of them."""
=======
"""Trainers. base: the contract; one file per kind of trainer (policy_gradient, forward_process, reward_difference, few_step), and
what they are made of. A method is a configuration of one of them."""
>>>>>>> main

from flowalign.trainers.base import (
    AdamWConfig,
    Batch,
    EdgeTrainer,
    EndpointDraws,
    Inspection,
    Replayed,
    Setup,
    Trainer,
    Update,
    UpdateForecast,
)
from flowalign.trainers.calibration import Calibration, GainBalance
<<<<<<< HEAD
from flowalign.trainers.cold_start import ColdStart
from flowalign.trainers.distillation import Distillation
=======
from flowalign.trainers.few_step import FewStep
from flowalign.trainers.few_step_updates import Directions, Surrogate
>>>>>>> main
from flowalign.trainers.forward_process import ForwardProcess
from flowalign.trainers.policy_gradient import PolicyGradient
from flowalign.trainers.pulls import Pulls
from flowalign.trainers.reward_difference import RewardDifference
from flowalign.trainers.samples import FromRollout, Places, Samples, SampleSource
from flowalign.trainers.signal import Signal
from flowalign.trainers.teachers import ManifoldAnchor, Route, Teacher
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine

__all__ = [
<<<<<<< HEAD
    "AdamWConfig", "Batch", "Calibration", "ColdStart", "Distillation", "ForwardProcess", "FromRollout", "GainBalance", "ManifoldAnchor", "Measures", "Part", "Places", "PolicyGradient", "Route", "SampleSource",
    "Samples", "Setup", "Signal", "States",
    "Teacher", "TrainedRole", "Trainer", "Update", "UpdateEngine", "UpdateForecast", "as_policy_gradient", "uncalibrated",
=======
    "AdamWConfig", "Batch", "Calibration", "Directions", "EdgeTrainer", "EndpointDraws", "FewStep", "ForwardProcess",
    "FromRollout", "GainBalance", "Inspection", "Measures", "Part", "Places", "PolicyGradient", "Pulls", "Replayed",
    "RewardDifference", "SampleSource", "Samples", "Setup", "Signal", "States", "Surrogate", "TrainedRole", "Trainer",
    "Update", "UpdateEngine", "UpdateForecast",
>>>>>>> main
]  # fmt: skip
