"""Objectives: pure functions of tensors. Losses of transitions and of states, step weights, KL penalties."""

from flowalign.objectives.adjoint import scalar_adjoint
from flowalign.objectives.anchors import Anchor, VelocityAnchor
from flowalign.objectives.certainty import Agreement, Certainty
from flowalign.objectives.dynamic_clip import DynamicClip
from flowalign.objectives.gate import Gate
from flowalign.objectives.guidance_distillation import GuidanceDistillation
from flowalign.objectives.kl import KLPenalty, Regularizer, RoleSteps
from flowalign.objectives.layer_tuning import LayerTuning
from flowalign.objectives.matching import Match, Pull, Steps
from flowalign.objectives.norm_guard import NormGuard
from flowalign.objectives.reward_losses import Hinge, Negative, RewardLoss
from flowalign.objectives.states import (
    NFT,
    AdvantageWeighted,
    CenteredReward,
    Coefficients,
    DrawIds,
    GroupPreference,
    Predictions,
    StateObjective,
)
from flowalign.objectives.step_weights import (
    FlatGradient,
    InverseLength,
    LongCat,
    MeanOne,
    StdOverMean,
    StepWeight,
    Uniform,
    without_states,
)
from flowalign.objectives.supervision import Supervision, Targets
from flowalign.objectives.teacher_targets import TeacherTargets
from flowalign.objectives.transitions import ClippedRatio, ClipRange, Guard, KLMask, Objective, Transitions

__all__ = [
    "ClipRange", "ClippedRatio", "DynamicClip", "Guard", "KLMask", "Objective", "Transitions", "KLPenalty", "NormGuard", "Regularizer", "RoleSteps",
    "GuidanceDistillation", "LayerTuning", "Supervision", "Targets", "TeacherTargets", "Gate", "Match", "Pull", "Steps", "Hinge", "Negative",
    "RewardLoss",
    "Agreement", "Certainty", "FlatGradient", "InverseLength", "LongCat", "MeanOne", "StdOverMean", "StepWeight", "Uniform", "without_states",
    "NFT", "AdvantageWeighted", "CenteredReward", "Coefficients", "DrawIds", "GroupPreference", "Predictions", "StateObjective",
    "Anchor", "VelocityAnchor", "scalar_adjoint",
]  # fmt: skip
