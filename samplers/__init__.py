"""Samplers: paths, schedules, kernels, plans and the rollout engine. Tensors only.

One convention everywhere: x_σ = (1−σ)·x0 + σ·ε, σ runs from 1 (noise) to 0 (data), v = ε − x0; a step goes from σ to
σ' < σ, h = σ − σ'. A rectified flow is such a path at every σ; a variance-preserving one (paths.py) names its discrete
levels by σ and has a velocity of its own.
Grids are fp32 [T+1] and start at 1 or just below, so a first step is known by its grid index 0, never by σ == 1.
States are [N, *], rows first; coefficients are computed in float64, states in at least fp32, and what is stored is what
is replayed. A sampler knows no network: the velocity is a callable, randomness is an argument.
`rollout` keeps no graph; `unroll` is differentiable in the start, the noise and the network, by the same steps.
"""

from samplers.ahead import drawn_ahead
from samplers.draws import (
    GridSigma,
    LogitNormalSigma,
    SampleKeys,
    ShiftedUniform,
    SigmaLaw,
    SquareRootSigma,
    UniformSigma,
)
from samplers.forest import Forest, Held
from samplers.forest_file import load_forest, save_forest
from samplers.frontier import Noise, Velocity
from samplers.kernels import (
    CPS,
    DDIM,
    ODE,
    SPSA,
    Affine,
    Ascent,
    AtPrediction,
    Carry,
    ClippedFlowSDE,
    DanceSDE,
    DPMSolver,
    DPMSolver2M,
    FlowSDE,
    Gaussian,
    Guided,
    Kernel,
    KLForm,
    LinearSDE,
    ProcessReward,
    RewardGradient,
    Step,
    StepwiseSDE,
    TransitionContext,
    UniPC,
    spsa_gradient,
)
from samplers.noise import KeyedNoise, generator, normal
from samplers.paths import Path, RectifiedFlow, VariancePreserving
from samplers.plans import (
    Bounded,
    Branch,
    Chain,
    Compressed,
    Deterministic,
    Fixed,
    Leveled,
    Plan,
    Position,
    Probed,
    Random,
    RandomSteps,
    Selected,
    Sliding,
    Sourced,
    SplitTree,
    TreeWindow,
    Window,
    branch,
    chain,
    compressed,
    probed,
    scattered,
    tree,
    window,
)  # fmt: skip
from samplers.rollout import rollout
from samplers.schedules import (
    FamilyGrid,
    Listed,
    PlainShift,
    Schedule,
    check_schedule,
    diffusers_sigmas,
    dynamic_sigmas,
    even_sigmas,
    plain_sigmas,
    shift,
    sigmas_of,
    stopped,
)
from samplers.selection import Best, Select, candidates, sampled, unscored
from samplers.trajectories import cost_to_go, mean_below, stopped_at, trajectory_share
from samplers.transfer import HostBuffer, Rows, fetch, send
from samplers.trees import SOURCES, Cost, Tree
from samplers.unroll import Unrolled, straight_through, unroll
from samplers.unshared import UnsharedTree, unshared

PART_OF = "flowalign"

__all__ = [
    "PART_OF",
    "Path", "RectifiedFlow", "VariancePreserving",
    "FamilyGrid", "Listed", "PlainShift", "Schedule", "check_schedule", "even_sigmas", "sigmas_of",
    "diffusers_sigmas", "dynamic_sigmas", "plain_sigmas", "shift", "stopped",
    "Affine", "Carry", "TransitionContext", "Gaussian", "Kernel", "KLForm", "Step",
    "CPS", "ClippedFlowSDE", "DDIM", "DanceSDE", "FlowSDE", "LinearSDE", "ODE", "StepwiseSDE",
    "DPMSolver", "DPMSolver2M", "UniPC", "Guided", "Ascent", "AtPrediction", "ProcessReward", "RewardGradient", "SPSA", "spsa_gradient",
    "SOURCES", "Cost", "Tree", "UnsharedTree", "unshared",
    "cost_to_go", "mean_below", "stopped_at", "trajectory_share",
    "Best", "Select", "candidates", "sampled", "unscored",
    "Bounded", "Plan", "Branch", "Chain", "Compressed", "Deterministic", "Leveled", "Probed", "RandomSteps", "Selected", "Sourced", "SplitTree",
    "TreeWindow", "Window", "branch", "chain", "compressed", "probed", "scattered", "tree", "window",
    "Fixed", "Position", "Random", "Sliding",
    "KeyedNoise", "drawn_ahead", "generator", "normal",
    "GridSigma", "LogitNormalSigma", "SampleKeys", "ShiftedUniform", "SigmaLaw", "SquareRootSigma", "UniformSigma",
    "Forest", "Held", "load_forest", "save_forest", "Noise", "Velocity", "rollout",
    "Unrolled", "straight_through", "unroll",
    "HostBuffer", "Rows", "fetch", "send",
]  # fmt: skip
