"""Trainers. base: the contract; one file per kind of trainer (policy_gradient, forward_process, reward_difference, distillation,
back_propagation, few_step), and what they are made of. A method is a configuration of one of them."""

from flowalign.trainers.back_propagation import BackPropagation
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
from flowalign.trainers.cold_start import ColdStart
from flowalign.trainers.distillation import Distillation
from flowalign.trainers.few_step import FewStep
from flowalign.trainers.few_step_updates import Directions, Surrogate
from flowalign.trainers.forward_process import ForwardProcess
from flowalign.trainers.image_samples import FromImages, FromPairs
from flowalign.trainers.policy_gradient import PolicyGradient
from flowalign.trainers.pulls import Pulls
from flowalign.trainers.reward_difference import RewardDifference
from flowalign.trainers.samples import FromRollout, Places, Samples, SampleSource
from flowalign.trainers.signal import Signal
from flowalign.trainers.teachers import ManifoldAnchor, Route, Teacher
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine

__all__ = [
    "AdamWConfig", "BackPropagation", "Batch", "Calibration", "ColdStart", "Directions", "Distillation",
    "EdgeTrainer", "EndpointDraws", "FewStep", "ForwardProcess", "FromImages", "FromPairs", "FromRollout",
    "GainBalance", "Inspection", "ManifoldAnchor", "Measures", "Part", "Places", "PolicyGradient", "Pulls",
    "Replayed", "RewardDifference", "Route", "SampleSource", "Samples", "Setup", "Signal", "States", "Surrogate",
    "Teacher", "TrainedRole", "Trainer", "Update", "UpdateEngine", "UpdateForecast",
]  # fmt: skip
