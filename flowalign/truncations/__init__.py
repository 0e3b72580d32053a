"""Truncations: which steps of a chain carry the gradient of a reward, and what the reward sees (trainer.truncation of
BackPropagation). They know samplers only: velocities and noise are functions that they are given."""

from flowalign.truncations.base import Chains, Outcome, Passes, Truncation, Visit
from flowalign.truncations.chains import LastSteps, LowVariance, RandomSuffix
from flowalign.truncations.direct_align import DirectAlign
from flowalign.truncations.endpoints import Sparse, TwoLeaps
from flowalign.truncations.predictions import EquallySpaced, OneStep

__all__ = [
    "Chains", "Outcome", "Passes", "Truncation", "Visit",
    "DirectAlign", "EquallySpaced", "LastSteps", "LowVariance", "OneStep", "RandomSuffix", "Sparse", "TwoLeaps",
]  # fmt: skip
