"""What back-propagation of a reward leaves to a part: which steps of a chain carry gradient, and what the reward sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from samplers import Kernel, Path, TransitionContext, Unrolled, Velocity, stopped, unroll

PLAIN = ((1.0, ""),)  # the reward of the prompt itself


@dataclass(frozen=True, eq=False)
class Visit:
    """A network call with graph: at the input x [n, *] the velocity v [n, *], for the step number `step` from σ to σ' with the
    noise level `level` (0: deterministic)."""

    x: Tensor
    v: Tensor
    sigma: Tensor
    sigma_next: Tensor
    step: int
    level: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a truncation made of n samples. looks: clean latents [n, *] with graph, which are decoded and scored; the loss of a
    sample is the mean over its looks. visits: all network calls with graph, at which regularizers are measured. words: pairs
    (w, text); the reward of an image is Σ w·r(image, text + prompt). weight [n]: of each sample in the loss; None: 1."""

    looks: tuple[Tensor, ...]
    visits: tuple[Visit, ...]
    words: tuple[tuple[float, str], ...] = PLAIN
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chains:
    """n samples that a part steps, from the start x [n, *] over sigmas [T+1].

    velocity(x, sigma, row) -> [n, *]: with graph where gradients are on; it counts its rows. noise: step -> its draws
    [n, *]; the other steps are deterministic. renoise(number) -> further keyed normal noise [n, *] of each sample.
    checkpoint: see `samplers.unroll`."""

    velocity: Velocity
    x: Tensor
    sigmas: Tensor
    kernel: Kernel
    path: Path
    renoise: Callable[[int], Tensor]
    noise: Mapping[int, Tensor] = field(default_factory=dict)
    checkpoint: bool = False

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def whole(
        self, active: Collection[int], cut: Collection[int] = (), stop: int | None = None
    ) -> tuple[Tensor, tuple[Visit, ...]]:
        """The end [n, *] of the chains, and what the `active` steps saw. stop: step `stop` jumps to the predicted clean data
        x̂0, without noise; None: no step does."""
        sigmas = self.sigmas if stop is None else stopped(self.sigmas, stop)
        noise = {step: eps for step, eps in self.noise.items() if stop is None or step < stop}
        unrolled = self.run(self.x, sigmas, active, cut, noise=noise)
        return unrolled.x, tuple(visit(unrolled, sigmas, step, float(step in noise)) for step in sorted(active))

    def run(
        self, x: Tensor, sigmas: Tensor, active: Collection[int] = (), cut: Collection[int] = (), *, cut_scale: float = 0.0,
        noise: Mapping[int, Tensor] | None = None,
    ) -> Unrolled:  # fmt: skip
        """`samplers.unroll` from x over `sigmas`, whose steps count from 0; by default deterministic and without graph."""
        return unroll(
            self.velocity, x, sigmas, self.kernel, noise, active=active, cut=cut, cut_scale=cut_scale,
            checkpoint=self.checkpoint,
        )  # fmt: skip

    def step(self, x: Tensor, v: Tensor, index: int) -> Tensor:
        """x [n, *] at level `index` after one deterministic step of the grid with a velocity that is known."""
        return unroll(lambda x, sigma, row: v, x, self.sigmas[index : index + 2], self.kernel).x

    def check_deterministic(self, part: object) -> None:
        """ValueError for stochastic steps, which `part` would pass over."""
        if self.noise:
            raise ValueError(
                f"got {part} with stochastic steps {sorted(self.noise)}, over which its jumps would lead; expected the ODE: set "
                "rollout.plan=samplers.Deterministic"
            )

    def check_one_step(self, part: object) -> None:
        """ValueError for a kernel whose steps use those before them, which `part` would begin anew on the way."""
        sigma, below = self.sigmas[:1].double(), self.sigmas[1:2].double()
        x = torch.zeros(1, 1, dtype=torch.float64)
        if self.kernel(x, x, sigma, below, TransitionContext(level=0.0, step=torch.zeros(1).long())).carry is not None:
            raise ValueError(
                f"got {part} with rollout.kernel={self.kernel}, whose steps depend on the ones before; expected a kernel of single "
                "steps: take samplers.ODE"
            )


def visit(unrolled: Unrolled, sigmas: Tensor, step: int, level: float = 0.0, number: int | None = None) -> Visit:
    """What a step of `unrolled` over `sigmas` saw. number: of the step in the grid, if another."""
    return Visit(
        unrolled.inputs[step], unrolled.velocities[step], sigmas[step], sigmas[step + 1],
        step if number is None else number, level,
    )  # fmt: skip


@dataclass(frozen=True)
class Passes:
    """What one sample costs, at most: network calls without graph and with one, images that are decoded, and images given to
    the reward."""

    without: int
    graph: int
    decodes: int = 1
    scores: int = 1


class Truncation(Protocol):
    """Which steps carry gradient, where the chain stops, what is cut, and what the reward sees. Steps count from 0, from noise
    to data."""

    def passes(self, steps: int) -> Passes:
        """The cost of one sample in `steps` steps. ValueError for a number of steps that it cannot work with."""
        ...

    def run(self, chains: Chains, rng: np.random.Generator) -> Outcome:
        """Each distinct state evaluated once. The samples of an iteration all get the same numbers from `rng`, in whatever
        micro-batches they are. ValueError for chains that it cannot work with."""
        ...


def check_steps(part: object, steps: int, needed: int) -> None:
    """ValueError unless a chain has as many steps as `part` needs."""
    if steps < needed:
        raise ValueError(
            f"got {part} with rollout.num_inference_steps={steps}; expected at least {needed}: lower it there, or take more steps"
        )
