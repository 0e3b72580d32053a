"""The engine with a graph: independent chains whose final state is differentiable in the start, the noise and the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from samplers.forest import compute_dtype
from samplers.frontier import Velocity, checked, transition
from samplers.kernels.base import Kernel
from samplers.plans.base import grow
from samplers.schedules import check_sigmas
from samplers.selection import trained_part


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The chains of `unroll`: states, T+1 tensors [N, *], the start first; inputs, T tensors [N, *], what the network saw of
    them (other than the states where a step is cut); velocities, T tensors [N, *], with which each step was taken. With
    their graphs."""

    states: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    velocities: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """The states at the last level [N, *]."""
        return self.states[-1]


def unroll(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    kernel: Kernel,
    noise: Mapping[int, Tensor] | None = None,
    *,
    active: Collection[int] | None = None,
    cut: Collection[int] = (),
    cut_scale: float = 0.0,
    checkpoint: bool = False,
) -> Unrolled:
    """Steps x [N, *] over `sigmas` [T+1], with graph; values are those of `rollout`, bit for bit.

    velocity(x [N, *], sigma [N], root [N]) -> v [N, *]: as in `rollout`; root is 0..N-1. Steps count from 0.
    noise: step -> its draws [N, *]; the other steps are deterministic (level 0). May require gradient, as x may.
    active: the steps whose velocity carries gradient (None: all); the others are evaluated without graph and are
    constants, but the state still passes through the kernel's arithmetic (x + (σ'-σ)·v: the identity for the ODE).
    cut: steps whose gradient through the *input* of the network is multiplied by `cut_scale` (0: the network sees a
    detached state), in [0, 1]; ∂v/∂weights stays.
    checkpoint: stores no activations of the network; the backward evaluates each active step again, under the weights,
    and inside the role, that are set then. A velocity that counts its rows counts these again.

    | method | call; the reward sees `.x` |
    |---|---|
    | DRaFT (2309.17400), AlignProp (2310.03739) | no argument; AlignProp's random truncation: a random set `active` |
    | DRaFT-K | active=range(T-K, T) |
    | DRaFT-LV | as K = 1, and the mean reward over copies: y = path.add_noise(out.x.detach(), ε_i, sigmas[-2]), then unroll(…, y, sigmas[-2:], …) |
    | ReFL (2304.05977) | sigmas=stopped(sigmas, k), active={k}: the last step is the prediction x̂0 at step k |
    | DRTune (2405.00760) | sigmas=stopped(sigmas, k), cut=range(k+1), active: the chosen steps |
    | ReNO (2406.04312) | x.requires_grad_(), the network frozen |
    | LeapAlign (2604.15311) | two leaps, sigmas[[k, j]] from x_k, then sigmas[[j, T]] with cut={0}, cut_scale=0.3; `straight_through` after each |
    | distillation through time | a loss on `states` and `velocities` |

    Memory: the graph of one network call per active step (with checkpoint: of one step at a time), and T states. An
    inactive step costs one evaluation and no graph. A reward-guided kernel's shift is a constant.
    ValueError for steps outside 0..T-1, noise of another shape, cut_scale outside [0, 1].
    """
    check_sigmas(sigmas)
    steps, draws = len(sigmas) - 1, dict(noise or {})
    with_graph = range(steps) if active is None else active
    _check(x, steps, draws, with_graph, cut, cut_scale)
    tree = grow(len(x), [1] * steps, [float(step in draws) for step in range(steps)])
    part, x, carry = trained_part(tree), x.to(compute_dtype(x.dtype)), None
    states, inputs, velocities = [x], list[Tensor](), list[Tensor]()
    for step, children in enumerate(tree.generations[1:]):
        parents = tree.parent[children]
        inputs.append(_scaled(x, cut_scale) if step in cut else x)
        sigma = x.new_full((len(x),), float(sigmas[step]), dtype=sigmas.dtype)
        arguments = velocity, inputs[-1], sigma, tree.root[parents]
        with torch.set_grad_enabled(torch.is_grad_enabled() and step in with_graph):
            v = recomputed(checked, *arguments, use_reentrant=False) if checkpoint else checked(*arguments)
        done = transition(kernel, x, v, sigmas, tree, children, carry, ~part[children])
        x, carry = done.sample(draws[step]) if step in draws else done.mean, done.carry
        states.append(x)
        velocities.append(v)
    return Unrolled(tuple(states), tuple(inputs), tuple(velocities))


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, bit for bit, in the forward; the gradient of `surrogate` in the backward (LeapAlign, FlowBP 2606.11075)."""
    return value.detach() + (surrogate - surrogate.detach())


def _scaled(x: Tensor, scale: float) -> Tensor:
    """x, its gradient times `scale`."""
    return straight_through(x, scale * x) if scale else x.detach()


def _check(
    x: Tensor,
    steps: int,
    draws: Mapping[int, Tensor],
    active: Collection[int],
    cut: Collection[int],
    cut_scale: float,
) -> None:
    if x.ndim < 2 or not len(x):
        raise ValueError(f"got x of shape {list(x.shape)}; expected [N, *], rows first")
    for name, numbers in (("noise", draws), ("active", active), ("cut", cut)):
        wrong = sorted(step for step in numbers if not 0 <= step < steps)
        if wrong:
            raise ValueError(f"got {name} at steps {wrong}; expected numbers inside 0..{steps - 1}, those of the grid")
    for step, eps in draws.items():
        if eps.shape != x.shape:
            raise ValueError(
                f"got noise {list(eps.shape)} at step {step}; expected that of the states, {list(x.shape)}"
            )
    if not 0.0 <= cut_scale <= 1.0:
        raise ValueError(f"got cut_scale={cut_scale}; expected a number from 0 (no gradient) to 1 (all of it)")
