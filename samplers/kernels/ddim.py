"""DDIM-η: the transition of ε- and v-prediction models (Song et al. 2010.02502, eq. 12 and 16; DDPO 2305.13301)."""

from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor

from samplers.kernels.base import Affine, Kernel, affine_step, check_choices, step_inputs
from samplers.kernels.gaussian import Constants, Reduce
from samplers.paths import Path, VariancePreserving


@dataclass(frozen=True)
class DDIM:
    """x' = √ᾱ'·x̂0 + √(1-ᾱ'-s²)·ε̂ + s·z, s = η·√[(1-ᾱ')/(1-ᾱ)·(1-ᾱ/ᾱ')], η = eta·level; η = 0 is the DDIM ODE.

    In (x, v) with v = √ᾱ·ε - √(1-ᾱ)·x0: α = √ᾱ'·√ᾱ + e·√(1-ᾱ), b = -√ᾱ'·√(1-ᾱ) + e·√ᾱ, e = √(1-ᾱ'-s²).
    path: the policy's own table of levels; None in a configuration, `bind` fills it in.
    The last step goes where the policy's grid ends: to timestep 0 (σ' = 1/K, ᾱ' = ᾱ_0 < 1) with the scheduler's
    set_alpha_to_one=False (Stable Diffusion; DDPO's code whatever it says): a small std, 0.02 in 50 steps; to clean
    data (σ' = 0, ᾱ' = 1) with true: std 0, no density. The std has no floor: such a step is drawn as its mean and
    must be left out of training (plans do by default), log_prob refuses it. Predictions are never clipped.
    """

    eta: float = 1.0
    path: VariancePreserving | None = field(default=None, repr=False)
    reduce: Reduce = "mean"
    constants: Constants = "full"
    uses_roots = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"got eta={self.eta}; expected a number from 0 (deterministic) to 1 (ancestral)")
        check_choices(self.reduce, self.constants)

    __call__ = affine_step

    def bind(self, path: Path) -> Kernel:
        """This kernel with the levels of a variance-preserving policy; ValueError for another path."""
        if path.rectified:
            raise ValueError(f"got DDIM for a policy on {path}; expected VariancePreserving (Stable Diffusion 1.5): "
                             "take FlowSDE, DanceSDE or CPS for a rectified flow")  # fmt: skip
        return replace(self, path=cast(VariancePreserving, path))

    def coefficients(
        self, sigma: Tensor, sigma_next: Tensor, level: Tensor | float = 1.0, step: Tensor | int | None = None
    ) -> Affine:
        """α, b, s [N], float64; σ names a level of the path."""
        if self.path is None:
            raise ValueError("got DDIM without a path; expected the policy's: DDIM(...).bind(policy.path)")
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        alpha_bar, alpha_bar_next = self.path.alpha_bar(sigma), self.path.alpha_bar(sigma_next)
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        variance = (
            (self.eta * level).square() * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        )
        kept_variance = 1 - alpha_bar_next - variance
        if bool((kept_variance < -1e-9).any()):
            raise ValueError(
                f"got eta={self.eta} times level {float(level.max())}; expected fresh noise within the step's total noise, "
                "1-ᾱ': lower the level"
            )
        a_next, kept_noise = alpha_bar_next.sqrt(), kept_variance.clamp(min=0).sqrt()
        return Affine(
            alpha=a_next * a + kept_noise * b, velocity_coef=-a_next * b + kept_noise * a, std=variance.sqrt()
        )
