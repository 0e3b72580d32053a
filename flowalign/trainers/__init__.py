"""Trainers. base: the contract; one file per kind of trainer (policy_gradient, forward_process, reward_difference), and what they
are made of (signal, update_engine, edge_update, pair_regression, trajectories, drift, trained_steps, dry_run, calibration). A method
is a configuration of one of them."""

from flowalign.trainers.base import AdamWConfig, Batch, Setup, Trainer, Update, UpdateForecast
from flowalign.trainers.calibration import Calibration, GainBalance
from flowalign.trainers.forward_process import ForwardProcess
from flowalign.trainers.image_samples import FromImages, FromPairs
from flowalign.trainers.policy_gradient import PolicyGradient, as_policy_gradient, uncalibrated
from flowalign.trainers.reward_difference import RewardDifference
from flowalign.trainers.samples import FromRollout, Places, Samples, SampleSource
from flowalign.trainers.signal import Signal
from flowalign.trainers.update_engine import Measures, Part, States, TrainedRole, UpdateEngine

__all__ = [
    "AdamWConfig", "Batch", "Calibration", "ForwardProcess", "FromImages", "FromPairs", "FromRollout", "GainBalance", "Measures", "Part", "Places", "PolicyGradient",
    "RewardDifference", "SampleSource", "Samples", "Setup", "Signal", "States",
    "TrainedRole", "Trainer", "Update", "UpdateEngine", "UpdateForecast", "as_policy_gradient", "uncalibrated",
]  # fmt: skip
