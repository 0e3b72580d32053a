"""Pure losses of tensors: clipped ratios, KL penalties, step weights, edge selection."""

from flowalign.objectives.policy import ClippedRatio, Objective
from flowalign.objectives.regularise import KLPenalty
from flowalign.objectives.select import AllEdges, NonZeroAdvantage, Selector
from flowalign.objectives.weights import FlatGradient, InverseLength, StdOverMean, StepWeight, Uniform

__all__ = [
    "AllEdges", "ClippedRatio", "FlatGradient", "InverseLength", "KLPenalty", "NonZeroAdvantage", "Objective",
    "Selector", "StdOverMean", "StepWeight", "Uniform",
]  # fmt: skip
