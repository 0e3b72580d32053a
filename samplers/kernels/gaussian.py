"""The Gaussian of one denoising step: drawing from it, its log density, its divergence from another.

Drawing and measuring are methods of one object, so rollout and update cannot disagree.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from samplers.transfer import Rows

Reduce = Literal["mean", "sum"]
Constants = Literal["full", "none"]
KLForm = Literal["exact", "exact_times_h", "velocity", "mean_sq"]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std²·I), one per row. Rows with std 0 are deterministic: they can be drawn, but have no density.

    mean [N, *]; std, velocity_coef (∂mean/∂v), step_size (h = σ - σ') [N].
    reduce: log_prob and kl are the "mean" over the D elements of a row (every reference implementation; clip ranges
    of 1e-5..1e-3 assume it) or the "sum" (nats). constants "none": log_prob is -reduce((x' - mean)²), without 1/(2
    std²) and the normalizer (Flow-CPS), which weights a step by 2·std² and is 0 with zero gradient where std is 0.
    std_on_host [N]: the numbers of std, for checks that do not wait for a device; None: they are read from it.
    """

    mean: Tensor
    std: Tensor
    velocity_coef: Tensor
    step_size: Tensor
    reduce: Reduce = "mean"
    constants: Constants = "full"
    std_on_host: Tensor | None = None

    @property
    def noiseless(self) -> Tensor:
        """[N] on the host: whether a row's std is 0."""
        return self._known_std == 0

    @property
    def _known_std(self) -> Tensor:
        return self.std.cpu() if self.std_on_host is None else self.std_on_host

    def rows(self, chosen: Rows) -> "Gaussian":
        """Those of `chosen` [n] alone."""
        if chosen.all_of(self.mean):
            return self
        values = {name: vars(self)[name][chosen.there] for name in ("mean", "std", "velocity_coef", "step_size")}
        return replace(self, **values, std_on_host=self._known_std[chosen.numbers])

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std·noise [N, *]; where std is 0 the mean, bit for bit."""
        check_same_shape("noise", noise, self.mean)
        std = spread(self.std, self.mean)
        return torch.where(std == 0, self.mean, self.mean + std * noise.to(self.mean.dtype))

    def log_prob(self, x_next: Tensor) -> Tensor:
        """[N] log density of `x_next` [N, *], reduced over elements. ValueError: full constants where std is 0."""
        check_same_shape("x_next", x_next, self.mean)
        error = x_next.to(self.mean.dtype) - self.mean
        if self.constants == "none":
            return -self._reduce(error.square())
        self._need_density("log_prob")
        elements = 1 if self.reduce == "mean" else self.mean.shape[1:].numel()
        quadratic = self._reduce((error / spread(self.std, self.mean)).square())
        return -0.5 * quadratic - elements * (self.std.log() + _HALF_LOG_2PI)

    def log_ratio(self, other: "Gaussian", x_next: Tensor) -> Tensor:
        """[N] log_prob(x_next) − other.log_prob(x_next), `other` being the same step under another velocity.

        ⟨Δμ·(x' − μ_other) − Δμ²/2⟩/std² with Δμ = μ − μ_other (constants "none": times 2·std²), reduced like log_prob: the
        normalizer cancels, so in fp32 only the rounding of the means is left. Exactly 0 for equal means.
        ValueError for another std, and for full constants where std is 0."""
        self._check_same_step(other)
        check_same_shape("x_next", x_next, self.mean)
        difference, error = self.mean - other.mean, x_next.to(self.mean.dtype) - other.mean
        if self.constants == "none":
            return self._reduce(difference * (2.0 * error - difference))
        self._need_density("log_ratio")
        return self._reduce(difference * (error - 0.5 * difference) / spread(self.std, self.mean).square())

    def kl(self, other: "Gaussian", form: KLForm = "exact_times_h") -> Tensor:
        """[N] divergence to `other`, the same step under another velocity; reduced like log_prob.

        exact: Δμ²/(2·std²), the KL divergence itself, whatever `constants`. It is the KL of CPS's code (2509.05952),
            whose denominator is the full std of a step: take it for betas tuned with CPS.
        exact_times_h: h·Δμ²/(2·std²), which is Δμ²/(2·g²) where std = g·√h: the KL of flow_grpo's code (2505.05470),
            which forgets h, so what betas of Flow-SDE are tuned for. On CPS no code means it: h times the KL of CPS's.
        velocity: Δv² = (Δμ/b)², without any variance, as in Flow-Factory ("v-based").
        mean_sq: Δμ², without any variance, as in Flow-Factory ("x-based") and GenRL's CPS.
        The first two need std > 0, else ValueError; mean_sq is finite at every step, velocity where b is not 0.
        Gradients reach both sides; detach the reference. Means are subtracted in the states' dtype: in fp32 a Δv near
        1e-7·|x|/|b| is rounding.
        """
        self._check_same_step(other)
        square = self._reduce((self.mean - other.mean).square())
        if form == "mean_sq":
            return square
        if form == "velocity":
            return square / self.velocity_coef.square()
        if form not in ("exact", "exact_times_h"):
            raise ValueError(f"got kl form {form!r}; expected 'exact', 'exact_times_h', 'velocity' or 'mean_sq'")
        self._need_density(f"kl(form={form!r})")
        exact = square / (2.0 * self.std.square())
        return exact * self.step_size if form == "exact_times_h" else exact

    def _check_same_step(self, other: "Gaussian") -> None:
        check_same_shape("the other mean", other.mean, self.mean)
        if not torch.equal(self._known_std, other._known_std):
            raise ValueError("got two Gaussians of different std; expected one step under two velocities: use the same "
                             "kernel, sigmas and level for both")  # fmt: skip

    def _reduce(self, values: Tensor) -> Tensor:
        flat = values.flatten(1)
        return flat.mean(1) if self.reduce == "mean" else flat.sum(1)

    def _need_density(self, what: str) -> None:
        if bool(self.noiseless.any()):
            rows = self.noiseless.nonzero().flatten().tolist()
            raise ValueError(
                f"got {what} of deterministic steps (std 0) in rows {rows[:8]}; expected std > 0, which a density needs: leave "
                "these steps out of training (level 0 in the plan), or take constants='none'"
            )


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, …, 1], to broadcast over the elements of `like`."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def check_same_shape(name: str, value: Tensor, expected: Tensor) -> None:
    """ValueError unless `value` has the shape of the states."""
    if value.shape != expected.shape:
        raise ValueError(
            f"got {name} of shape {tuple(value.shape)}; expected {tuple(expected.shape)}, that of the states: one row "
            "per step, so repeat a state that several children leave"
        )
