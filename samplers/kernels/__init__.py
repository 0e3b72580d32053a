"""Denoising transitions, one kernel per file."""

from samplers.kernels.base import Affine, Context, Gaussian, Kernel, KLForm, Step
from samplers.kernels.cps import CPS
from samplers.kernels.dance_sde import DanceSDE
from samplers.kernels.ddim import DDIM
from samplers.kernels.flow_sde import FlowSDE
from samplers.kernels.ode import ODE

__all__ = ["CPS", "DDIM", "ODE", "Affine", "Context", "DanceSDE", "FlowSDE", "Gaussian", "KLForm", "Kernel", "Step"]
