"""The DDIM-like sampler of Stepwise-Flow-GRPO (arXiv 2603.28718): noise that fades towards pure noise."""

from dataclasses import dataclass

from torch import Tensor

from samplers.kernels.base import (
    Affine,
    affine_step,
    bind_rectified_flow,
    check_choices,
    check_noise_level,
    euler_where_deterministic,
    step_inputs,
)
from samplers.kernels.gaussian import Constants, Reduce


@dataclass(frozen=True)
class StepwiseSDE:
    """x' = (1-σ')·x̂0 + √(σ'²-ς²)·ε̂ + ς·z, ς = η·σ'·√(1-σ), η = noise_level·level in [0, 1].

    α = (1-σ') + k, b = -σ(1-σ') + (1-σ)k, s = ς, with k = √(σ'²-ς²): CPS, whose sinφ is η·√(1-σ) here. noise_level: ours,
    as the paper's η is not known to us.
    A step from σ = 1 has no noise, hence no log-prob: let the plan leave it deterministic, such as Window(low=1, size=8)
    of ten steps. So has the step to σ' = 0.
    Kept: the total noise, exactly, at any step size. Not kept: the marginals of spread-out data, as with CPS: more steps
    at one η do not converge.
    """

    noise_level: float = 0.7
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        check_noise_level(self.noise_level, highest=1.0)
        check_choices(self.reduce, self.constants)

    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64."""
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        eta = self.noise_level * level
        if bool((eta > 1.0 + 1e-12).any()):
            raise ValueError(
                f"got noise_level·level = {float(eta.max())}; expected at most 1, where StepwiseSDE may refresh all noise: lower "
                "the level"
            )
        std = eta * sigma_next * (1.0 - sigma).sqrt()
        kept_noise = (sigma_next.square() - std.square()).clamp(min=0.0).sqrt()
        affine = Affine(
            alpha=(1.0 - sigma_next) + kept_noise,
            velocity_coef=-sigma * (1.0 - sigma_next) + (1.0 - sigma) * kept_noise,
            std=std,
        )
        return euler_where_deterministic(affine, eta, sigma, sigma_next)
