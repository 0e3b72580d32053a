"""Noising laws x = a(σ)·x0 + b(σ)·ε, and every conversion between x0, noise, score and velocity.

Velocity is the direction c·x0 + d·ε, normalized so that a·d - b·c = 1: ε - x0 for rectified flow, and diffusers'
"v_prediction" a·ε - b·x0 for variance-preserving models. All tensors [N, *], sigma one number or [N].
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.transfer import send


class Path(Protocol):
    """A noising law, with σ from 1 (noise) to 0 (data)."""

    @property
    def rectified(self) -> bool:
        """Whether it is the straight law x = (1-σ)·x0 + σ·ε, at every σ in [0, 1]: what FlowSDE and CPS are written for."""
        ...

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, c, d) of x = a·x0 + b·ε and v = c·x0 + d·ε, each of the shape of σ."""
        ...

    def x0_from_velocity(self, x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
        """x̂0 = d·x - b·v, finite at every σ."""
        ...

    def add_noise(self, x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
        """a·x0 + b·ε [N, *]."""
        ...

    def velocity(self, x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
        """c·x0 + d·ε [N, *]: the regression target of a velocity at add_noise(x0, ε, σ)."""
        ...

    def bridge(self, x: Tensor, eps: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float) -> Tensor:
        """Re-noises x [N, *] from its level up to σ_to >= σ_from, exactly: if x has the marginal of σ_from, the result
        α·x + β·ε has that of σ_to, α = a'/a, β² = b'² - α²b² (TDM 2503.06674). ValueError for σ_to < σ_from and for
        σ_from where a = 0."""
        ...

    def bridge_velocity(self, x: Tensor, eps: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float) -> Tensor:
        """The regression target of a velocity at bridge(x, ε, σ_from, σ_to), whose mean given that state is the exact
        velocity: (c'/a)·x + ((b'd' - α·c'·b²/a)/β)·ε, `velocity` where σ_from = 0. ValueError for σ_to <= σ_from."""
        ...

    def nearest(self, sigma: Tensor) -> Tensor:
        """The level above 0 that the path has nearest to each σ in (0, 1]; a tie goes to the noisier one."""
        ...


def _mix(path: Path, sigma: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four coefficients in the dtype of `like`, shaped to broadcast over its elements."""
    return _beside(like, *_mix_of_rows(path, sigma, like))


def _beside(like: Tensor, *coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four coefficients in the dtype of `like`, on its device."""
    a, b, c, d = send(like.device, *(t.to(like.dtype) for t in coefficients))
    return a, b, c, d


def _mix_of_rows(path: Path, sigma: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four coefficients in float64, where sigma is, shaped to broadcast over the elements of `like`."""
    rows = torch.as_tensor(sigma, dtype=torch.float64)
    if rows.ndim > 1 or (rows.ndim == 1 and len(rows) not in (1, len(like))):
        raise ValueError(f"got sigma of shape {tuple(rows.shape)}; expected one number or [{len(like)}], one per row")
    if _on_host(rows) and not bool(((rows >= 0) & (rows <= 1)).all()):
        raise ValueError(f"got sigma {rows.flatten()[:8].tolist()}; expected levels inside [0, 1], not timesteps")
    return path.mix(rows.reshape(-1, *[1] * (like.ndim - 1)) if rows.ndim else rows)


def _on_host(values: Tensor) -> bool:
    """Whether numbers can be checked without waiting for a device."""
    return values.device.type == "cpu"


def _add_noise(self: Path, x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """a·x0 + b·ε."""
    a, b, _, _ = _mix(self, sigma, x0)
    return a * x0 + b * eps


def _velocity(self: Path, x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """The regression target c·x0 + d·ε."""
    _, _, c, d = _mix(self, sigma, x0)
    return c * x0 + d * eps


def _bridge(self: Path, x: Tensor, eps: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float) -> Tensor:
    """See Path."""
    alpha, beta, _, _ = _beside(x, *_bridge_mix(self, x, sigma_from, sigma_to))
    return alpha * x + beta * eps


def _bridge_velocity(
    self: Path, x: Tensor, eps: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float
) -> Tensor:
    """See Path: the derivative of the bridge in the path's own normalization, from the score -ε/β of its transition."""
    mix = _bridge_mix(self, x, sigma_from, sigma_to)
    _, _, of_x, of_eps = _beside(x, *mix)
    if _on_host(mix[1]) and not bool((mix[1].to(x.dtype) > 0).all()):
        raise ValueError(f"got sigma_from={sigma_from}, sigma_to={sigma_to}; expected sigma_to > sigma_from in every row: "
                         "without fresh noise there is no target")  # fmt: skip
    return of_x * x + of_eps * eps


def _bridge_mix(
    path: Path, x: Tensor, sigma_from: Tensor | float, sigma_to: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(α, β) of the bridge and the coefficients of x and ε in its velocity target, shaped to broadcast over x. float64: β² is a
    difference of near equals for close levels."""
    a, b, _, _ = _mix_of_rows(path, sigma_from, x)
    a_to, b_to, c_to, d_to = _mix_of_rows(path, sigma_to, x)
    low, high = (torch.as_tensor(sigma, dtype=torch.float64) for sigma in (sigma_from, sigma_to))
    if _on_host(low) and _on_host(high) and (not bool((low <= high).all()) or bool((a == 0).any())):
        raise ValueError(
            f"got sigma_from={sigma_from}, sigma_to={sigma_to}; expected sigma_from <= sigma_to in every row, and data left "
            "at sigma_from (below 1): a bridge only adds noise"
        )
    alpha = a_to / a
    beta = (b_to.square() - alpha.square() * b.square()).clamp(min=0).sqrt()
    of_eps = (b_to * d_to - alpha * c_to * b.square() / a) / beta
    return alpha, beta, c_to / a, of_eps


def _x0_from_velocity(self: Path, x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    _, b, _, d = _mix(self, sigma, x)
    return d * x - b * v


def _x0_from_noise(self: Path, x: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where a = 0."""
    a, b, _, _ = _mix(self, sigma, x)
    return (x - b * eps) / a


def _x0_from_score(self: Path, x: Tensor, score: Tensor, sigma: Tensor | float) -> Tensor:
    """Tweedie's formula; infinite where a = 0."""
    a, b, _, _ = _mix(self, sigma, x)
    return (x + b.square() * score) / a


def _noise_from_velocity(self: Path, x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    a, _, c, _ = _mix(self, sigma, x)
    return a * v - c * x


def _noise_from_x0(self: Path, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where b = 0."""
    a, b, _, _ = _mix(self, sigma, x)
    return (x - a * x0) / b


def _noise_from_score(self: Path, x: Tensor, score: Tensor, sigma: Tensor | float) -> Tensor:
    _, b, _, _ = _mix(self, sigma, x)
    return -b * score


def _score_from_velocity(self: Path, x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where b = 0."""
    a, b, c, _ = _mix(self, sigma, x)
    return (c * x - a * v) / b


def _score_from_noise(self: Path, x: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where b = 0."""
    _, b, _, _ = _mix(self, sigma, x)
    return -eps / b


def _score_from_x0(self: Path, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where b = 0."""
    a, b, _, _ = _mix(self, sigma, x)
    return (a * x0 - x) / b.square()


def _velocity_from_x0(self: Path, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where b = 0."""
    _, b, _, d = _mix(self, sigma, x)
    return (d * x - x0) / b


def _velocity_from_noise(self: Path, x: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where a = 0."""
    a, _, c, _ = _mix(self, sigma, x)
    return (c * x + eps) / a


def _velocity_from_score(self: Path, x: Tensor, score: Tensor, sigma: Tensor | float) -> Tensor:
    """Infinite where a = 0."""
    a, b, c, _ = _mix(self, sigma, x)
    return (c * x - b * score) / a


@dataclass(frozen=True)
class RectifiedFlow:
    """x = (1-σ)·x0 + σ·ε, v = ε - x0 = dx/dσ."""

    rectified = True

    def a(self, sigma: Tensor) -> Tensor:
        """Coefficient of the data."""
        return 1.0 - sigma

    def b(self, sigma: Tensor) -> Tensor:
        """Coefficient of the noise."""
        return sigma

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(1-σ, σ, -1, 1)."""
        return self.a(sigma), self.b(sigma), -torch.ones_like(sigma), torch.ones_like(sigma)

    def nearest(self, sigma: Tensor) -> Tensor:
        """σ itself."""
        return sigma

    add_noise = _add_noise
    velocity = _velocity
    bridge = _bridge
    bridge_velocity = _bridge_velocity
    x0_from_velocity = _x0_from_velocity
    x0_from_noise = _x0_from_noise
    x0_from_score = _x0_from_score
    noise_from_velocity = _noise_from_velocity
    noise_from_x0 = _noise_from_x0
    noise_from_score = _noise_from_score
    score_from_velocity = _score_from_velocity
    score_from_noise = _score_from_noise
    score_from_x0 = _score_from_x0
    velocity_from_x0 = _velocity_from_x0
    velocity_from_noise = _velocity_from_noise
    velocity_from_score = _velocity_from_score


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """x = √ᾱ·x0 + √(1-ᾱ)·ε on the discrete levels of an ε- or v-model; v = √ᾱ·ε - √(1-ᾱ)·x0.

    alphas_cumprod [K]: the scheduler's own table. σ names a level: σ = (t+1)/K is timestep t, σ = 0 clean data
    (ᾱ = 1). Other values of σ are an error: such a model knows no level in between.
    """

    alphas_cumprod: Tensor
    rectified = False

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 1 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(f"got alphas_cumprod of shape {tuple(table.shape)}; expected [K] numbers inside [0, 1]")

    def alpha_bar(self, sigma: Tensor) -> Tensor:
        """ᾱ at the levels σ, float64."""
        steps = len(self.alphas_cumprod)
        level = sigma.double() * steps  # t + 1, or 0 for clean data
        if _on_host(sigma) and bool(((level - level.round()).abs() > 1e-3).any()):
            raise ValueError(
                f"got sigma {sigma.flatten()[:8].tolist()}; expected multiples of 1/{steps}: (t+1)/{steps}"
            )
        (table,) = send(
            sigma.device, torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod.double().cpu()])
        )
        return table[level.round().long()]

    def a(self, sigma: Tensor) -> Tensor:
        """Coefficient of the data."""
        return self.alpha_bar(sigma).sqrt()

    def b(self, sigma: Tensor) -> Tensor:
        """Coefficient of the noise."""
        return (1.0 - self.alpha_bar(sigma)).sqrt()

    def mix(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(√ᾱ, √(1-ᾱ), -√(1-ᾱ), √ᾱ)."""
        a, b = self.a(sigma), self.b(sigma)
        return a, b, -b, a

    def nearest(self, sigma: Tensor) -> Tensor:
        """A multiple of 1/K, at least 1/K."""
        steps = len(self.alphas_cumprod)
        return (sigma.double() * steps + 0.5).floor().clamp(min=1).div(steps).to(sigma.dtype)

    add_noise = _add_noise
    velocity = _velocity
    bridge = _bridge
    bridge_velocity = _bridge_velocity
    x0_from_velocity = _x0_from_velocity
    x0_from_noise = _x0_from_noise
    x0_from_score = _x0_from_score
    noise_from_velocity = _noise_from_velocity
    noise_from_x0 = _noise_from_x0
    noise_from_score = _noise_from_score
    score_from_velocity = _score_from_velocity
    score_from_noise = _score_from_noise
    score_from_x0 = _score_from_x0
    velocity_from_x0 = _velocity_from_x0
    velocity_from_noise = _velocity_from_noise
    velocity_from_score = _velocity_from_score
