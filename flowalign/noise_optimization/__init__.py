"""Better images from an unchanged model: the start noise is optimized, or searched, for rewards. A method is one class of
`ascent` or `searches`; `optimize` has the one loop, `objective` leads from noise to scores."""

from flowalign.noise_optimization.ascent import SPSA, Ascent, Gradient
from flowalign.noise_optimization.optimize import optimize_noise
from flowalign.noise_optimization.result import NoiseResult, read_noise
from flowalign.noise_optimization.searches import BestOfN, PathSearch, PreviewSelect, ZeroOrder

__all__ = [
    "SPSA",
    "Ascent",
    "BestOfN",
    "Gradient",
    "NoiseResult",
    "PathSearch",
    "PreviewSelect",
    "ZeroOrder",
    "optimize_noise",
    "read_noise",
]
