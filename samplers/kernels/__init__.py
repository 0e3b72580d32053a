"""Denoising transitions, one kernel per file."""

from samplers.kernels.ascent import SPSA, Ascent, AtPrediction, ProcessReward, RewardGradient, spsa_gradient
from samplers.kernels.base import Affine, Carry, Kernel, Step, TransitionContext
from samplers.kernels.clipped_flow_sde import ClippedFlowSDE
from samplers.kernels.cps import CPS
from samplers.kernels.dance_sde import DanceSDE
from samplers.kernels.ddim import DDIM
from samplers.kernels.dpm_solver import DPMSolver
from samplers.kernels.dpm_solver_2m import DPMSolver2M
from samplers.kernels.flow_sde import FlowSDE
from samplers.kernels.gaussian import Gaussian, KLForm
from samplers.kernels.guided import Guided
from samplers.kernels.linear_sde import LinearSDE
from samplers.kernels.ode import ODE
from samplers.kernels.stepwise_sde import StepwiseSDE
from samplers.kernels.unipc import UniPC

__all__ = [
    "Affine", "Carry", "TransitionContext", "Gaussian", "Kernel", "KLForm", "Step",
    "ODE", "FlowSDE", "ClippedFlowSDE", "DanceSDE", "LinearSDE", "CPS", "DDIM", "StepwiseSDE",
    "DPMSolver", "DPMSolver2M", "UniPC", "Guided", "Ascent", "AtPrediction", "ProcessReward", "RewardGradient", "SPSA", "spsa_gradient",
]  # fmt: skip
