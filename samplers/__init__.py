"""Samplers: paths, schedules, kernels, plans and the rollout engine. Tensors only.

One convention everywhere: x_σ = (1−σ)·x0 + σ·ε, σ runs from 1 (noise) to 0 (data), v = ε − x0, h = σ − σ' > 0.
A sampler knows no network: the velocity is a callable, randomness is an argument.
"""

from samplers.forest import Forest, Velocities
from samplers.kernels import (
    CPS,
    DDIM,
    ODE,
    SPSA,
    Affine,
    Ascent,
    Carry,
    ClippedFlowSDE,
    Context,
    DanceSDE,
    DPMSolver,
    FlowSDE,
    Gaussian,
    Guided,
    Kernel,
    KLForm,
    LinearSDE,
    ProcessReward,
    RewardGradient,
    Step,
    spsa_gradient,
)
from samplers.noise import STREAMS, KeyedNoise, generator, normal
from samplers.paths import Path, RectifiedFlow, VariancePreserving
from samplers.plans import Chain, Fixed, Plan, Position, Random, Sliding, Window, chain, window
from samplers.rollout import rollout
from samplers.schedules import diffusers_sigmas, dynamic_sigmas, plain_sigmas, shift, unshift
from samplers.stored import load_forest, save_forest
from samplers.trees import Cost, Tree

PART_OF = "flowalign"

__all__ = [
    "PART_OF",
    "Path", "RectifiedFlow", "VariancePreserving",
    "diffusers_sigmas", "dynamic_sigmas", "plain_sigmas", "shift", "unshift",
    "Affine", "Carry", "Context", "Gaussian", "Kernel", "KLForm", "Step",
    "CPS", "ClippedFlowSDE", "DDIM", "DanceSDE", "FlowSDE", "LinearSDE", "ODE",
    "DPMSolver", "Guided", "Ascent", "ProcessReward", "RewardGradient", "SPSA", "spsa_gradient",
    "Cost", "Tree", "Chain", "Fixed", "Plan", "Position", "Random", "Sliding", "Window", "chain", "window",
    "STREAMS", "KeyedNoise", "generator", "normal",
    "Forest", "Velocities", "load_forest", "save_forest", "rollout",
]  # fmt: skip
