"""Pure losses of tensors: clipped ratios, masks, KL penalties, state targets, step weights, edge selection."""

from flowalign.objectives.adjoint import scalar_adjoint
from flowalign.objectives.dynamic_clip import DynamicClip
from flowalign.objectives.transitions import ClippedRatio, Guard, KLMask, Known, Objective
from flowalign.selectors.prune import DepthWindow, ExtremeB, ParentTop1
from flowalign.objectives.kl import KLPenalty
from flowalign.selectors.edges import (
    All,
    AllEdges,
    BestOfN,
    Fraction,
    Moment,
    NonZeroAdvantage,
    PositiveNegativeBalance,
    Selector,
)
from flowalign.objectives.layer_tuning import LayerTuning, Targets
from flowalign.objectives.step_weights import FlatGradient, InverseLength, LongCat, StdOverMean, StepWeight, Uniform

__all__ = [
    "ClippedRatio", "DynamicClip", "Guard", "KLMask", "Known", "Objective", "KLPenalty", "LayerTuning", "Targets",
    "All", "AllEdges", "BestOfN", "DepthWindow", "ExtremeB", "Fraction", "Moment", "NonZeroAdvantage", "ParentTop1",
    "PositiveNegativeBalance", "Selector",
    "FlatGradient", "InverseLength", "LongCat", "StdOverMean", "StepWeight", "Uniform",
    "scalar_adjoint",
]  # fmt: skip
