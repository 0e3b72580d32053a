"""Pure losses of tensors: clipped ratios, masks, KL penalties, state targets, step weights, edge selection."""

from flowalign.objectives.adjoint import scalar_adjoint
from flowalign.objectives.dynamic import DynamicClip
from flowalign.objectives.policy import ClippedRatio, Guard, KLMask, Known, Objective
from flowalign.objectives.prune import DepthWindow, ExtremeB, ParentTop1
from flowalign.objectives.regularise import KLPenalty
from flowalign.objectives.select import (
    All,
    AllEdges,
    BestOfN,
    Fraction,
    Moment,
    NonZeroAdvantage,
    PositiveNegativeBalance,
    Selector,
)
from flowalign.objectives.targets import LayerTuning, Targets
from flowalign.objectives.weights import FlatGradient, InverseLength, LongCat, StdOverMean, StepWeight, Uniform

__all__ = [
    "ClippedRatio", "DynamicClip", "Guard", "KLMask", "Known", "Objective", "KLPenalty", "LayerTuning", "Targets",
    "All", "AllEdges", "BestOfN", "DepthWindow", "ExtremeB", "Fraction", "Moment", "NonZeroAdvantage", "ParentTop1",
    "PositiveNegativeBalance", "Selector",
    "FlatGradient", "InverseLength", "LongCat", "StdOverMean", "StepWeight", "Uniform",
    "scalar_adjoint",
]  # fmt: skip
