"""Samplers: paths, schedules, kernels, plans and the rollout engine. Tensors only.

One convention everywhere: x_σ = (1−σ)·x0 + σ·ε, σ runs from 1 (noise) to 0 (data), v = ε − x0, h = σ − σ' > 0.
A sampler knows no network: the velocity is a callable, randomness is an argument.
"""

from samplers.forest import Forest, Velocities
from samplers.kernels import CPS, DDIM, ODE, Affine, Context, DanceSDE, FlowSDE, Gaussian, Kernel, KLForm, Step
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
    "Affine", "Context", "Gaussian", "Kernel", "KLForm", "Step", "CPS", "DDIM", "DanceSDE", "FlowSDE", "ODE",
    "Cost", "Tree", "Chain", "Fixed", "Plan", "Position", "Random", "Sliding", "Window", "chain", "window",
    "STREAMS", "KeyedNoise", "generator", "normal",
    "Forest", "Velocities", "load_forest", "save_forest", "rollout",
]  # fmt: skip
