"""UniPC and DPMSolver2M: difference 0 to diffusers' schedulers as Wan and SANA release them, order, rows, gradients, refusals."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from samplers import (
    Carry,
    DPMSolver2M,
    FamilyGrid,
    Kernel,
    Rows,
    TransitionContext,
    UniPC,
    compressed,
    rollout,
    scattered,
    sigmas_of,
    unroll,
    window,
)
from tests.helpers.kernels import F64, FLOW, VP, bed, rows

FLOW_SETTINGS = {
    "use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2, "lower_order_final": True,
    "final_sigmas_type": "zero",
}  # fmt: skip
SOLVERS: dict[str, tuple[Kernel, Callable[..., Any], dict[str, Any]]] = {
    "wan": (UniPC(), UniPCMultistepScheduler, {"solver_type": "bh2", "predict_x0": True}),
    "sana": (
        DPMSolver2M(), DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
    ),
}  # fmt: skip
KERNELS = [kernel for kernel, _, _ in SOLVERS.values()]
EVERY_SOLVER = pytest.mark.parametrize("kernel", KERNELS, ids=SOLVERS)


def scheduler_of(name: str, shift: float, steps: int) -> Any:
    """As released, at the first of `steps` steps."""
    _, scheduler, own = SOLVERS[name]
    made = scheduler(flow_shift=shift, **FLOW_SETTINGS, **own)
    made.set_timesteps(steps)
    return made


def curved(x: Tensor, sigma: Tensor, root: Tensor | None = None) -> Tensor:
    """A velocity that is affine neither in x nor in σ, and mixes elements of a row."""
    return torch.sin(3 * x) - 0.5 * x * sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)).square() + 0.2 * x.roll(1, -1)


def by_scheduler(scheduler: Any, velocity: Callable[..., Tensor], x: Tensor) -> Tensor:
    """All states of the scheduler's own loop [T+1, N, *]."""
    states = [x]
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        v = velocity(states[-1], sigma.expand(len(x)))
        states.append(scheduler.step(v, timestep, states[-1], return_dict=False)[0])
    return torch.stack(states)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rolled_out(kernel: Kernel, velocity: Callable[..., Tensor], x: Tensor, grid: Tensor) -> Tensor:
    """All states of a rollout [T+1, N, *]."""
    tree = scattered(len(grid) - 1, len(x), (), shared_start=False)
    forest = rollout(velocity, x, grid, tree, kernel, no_noise, store_dtype=x.dtype, keep="all")
    return torch.stack([forest.at(nodes) for nodes in tree.generations])


def no_noise(tree: Any, nodes: Tensor) -> Tensor:
    raise AssertionError("a deterministic rollout asked for noise")


# ---------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_state_is_the_schedulers_bit_for_bit(name: str, shift: float, steps: int) -> None:
    """Images and videos, one row and several; diffusers lowers the order by the number of steps (below 15) and at σ' = 0."""
    for shape in ((3, 4, 5, 6), (1, 16, 5, 8, 8), (2, 3, 2, 4, 4)):
        scheduler, x = scheduler_of(name, shift, steps), noise(*shape)
        theirs = by_scheduler(scheduler, curved, x)
        assert torch.equal(rolled_out(SOLVERS[name][0], curved, x, scheduler.sigmas), theirs)
        assert float((theirs[-1] - x).abs().max()) > 0.1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_bf16_prediction_is_taken_in_fp32_as_sanas_pipeline_does(name: str) -> None:
    """Wan's pipeline does not cast: in bf16 its scheduler rounds σ·v to bf16, which the kernel does not."""
    grid, x = scheduler_of(name, 3.0, 8).sigmas, noise(2, 4, 5, 6)
    theirs = by_scheduler(scheduler_of(name, 3.0, 8), lambda x, sigma: curved(x, sigma).bfloat16().float(), x)
    ours = rolled_out(SOLVERS[name][0], lambda *a: curved(*a).bfloat16(), x, grid)
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32


@pytest.mark.parametrize("name", SOLVERS)
def test_the_schedulers_grids_are_accepted_and_give_the_integer_timesteps(name: str) -> None:
    """They start below 1. The network sees int64 timesteps, truncated from float64 levels: floor(1000·σ) in float64 of the fp32
    level is the same number for the released shifts."""
    for shift, steps in itertools.product((3.0, 5.0, 8.0, 12.0), range(1, 101)):
        scheduler = scheduler_of(name, shift, steps)
        grid = sigmas_of(FamilyGrid(), steps, lambda steps, grid=scheduler.sigmas: grid)
        assert 0.999 < float(grid[0]) < 1 and float(grid[-1]) == 0
        assert torch.equal((grid[:-1].double() * 1000).floor().long(), scheduler.timesteps)


# ---------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize(
    ("kernel", "high", "low", "order"),
    [
        (UniPC(), 0.9, 0.1, 3.0),
        (DPMSolver2M(), 0.9, 0.1, 2.0),
        (UniPC(), 1.0, 0.0, 2.2),
        (DPMSolver2M(), 1.0, 0.0, 1.8),
    ],
)
def test_the_order_of_convergence(kernel: Kernel, high: float, low: float, order: float) -> None:
    """Gaussian data, whose exact flow is known. The corrector adds one order; the last step to σ = 0, x' = x̂0, costs some."""
    velocity, marginal = bed(FLOW)
    exact = (1 - low) * 0.5 + math.sqrt(marginal(low) / marginal(high)) * (1.1 - (1 - high) * 0.5)
    grids = [torch.linspace(high, low, steps + 1, dtype=F64) for steps in (128, 256)]
    errors = [abs(float(unroll(velocity, rows(1.1), grid, kernel).x) - exact) for grid in grids]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1), errors


@EVERY_SOLVER
@pytest.mark.parametrize("first", [1.0, 0.999999, 0.99])
def test_a_point_mass_is_exact_from_any_first_level(kernel: Kernel, first: float) -> None:
    """x̂0 = m always, so (1-σ)·m + σ·ε stays on its line; at σ = 1, where λ is infinite, too."""
    grid, m, eps = torch.tensor([first, 0.9, 0.5, 0.45, 0.1, 0.0], dtype=F64), rows(0.3, -0.2), rows(1.1, 0.4)
    x = (1 - first) * m + first * eps
    out = unroll(lambda x, sigma, root: (x - m) / sigma[:, None], x, grid, kernel)
    for state, sigma in zip(out.states, grid, strict=True):
        torch.testing.assert_close(state, (1 - sigma) * m + sigma * eps, rtol=0, atol=1e-12)


@EVERY_SOLVER
def test_the_first_step_goes_by_history_not_by_its_level(kernel: Kernel) -> None:
    """From anywhere it is Euler's; with a history it is not, also from σ = 1 - 1e-6."""
    x, v, before = noise(2, 3).double(), noise(3, 3)[1:].double(), noise(4, 3)[2:].double()
    ctx = TransitionContext(level=0.0)
    for sigma, then in ((1.0, 0.7), (0.999999, 0.7), (0.6, 0.1)):
        torch.testing.assert_close(kernel(x, v, sigma, then, ctx).mean, x - (sigma - then) * v, rtol=0, atol=1e-9)
    carry = kernel(x, before, 0.8, 0.6, ctx).carry
    following = kernel(x, v, 0.6, 0.1, TransitionContext(level=0.0, carry=carry)).mean
    assert float((following - (x - 0.5 * v)).abs().max()) > 0.01


# ---------------------------------------------------------------------------------------------- rows


@EVERY_SOLVER
def test_rows_at_different_levels_are_each_alone_bit_for_bit(kernel: Kernel) -> None:
    """One of them ends at 0 two steps before the others end elsewhere."""
    grids = torch.tensor([[0.999, 0.8, 0.4, 0.0], [0.7, 0.69, 0.2, 0.1], [0.95, 0.5, 0.45, 0.0]])
    x, carry = noise(3, 2, 4), None
    alone = torch.cat([unroll(curved, row[None], grid, kernel).x for row, grid in zip(x, grids, strict=True)])
    for sigma, then in itertools.pairwise(grids.unbind(1)):
        step = kernel(x, curved(x, sigma), sigma, then, TransitionContext(level=torch.zeros(3), carry=carry))
        x, carry = step.mean, step.carry
    assert torch.equal(x, alone)


@EVERY_SOLVER
def test_a_chain_that_jumps_is_the_chain_on_its_levels(kernel: Kernel) -> None:
    """A compressed tail: the history is that of the step before, whatever its grid index."""
    tree, grid = compressed(window(12, 3, 0, 1, shared_start=False), 0.4), scheduler_of("wan", 5.0, 12).sigmas
    tree = type(tree).from_parents(tree.parent.tolist(), tree.index.tolist(), [0.0] * len(tree), 12)
    x = noise(3, 2, 4)
    forest = rollout(curved, x, grid, tree, kernel, no_noise)
    visited = [int(tree.index[nodes[0]]) for nodes in tree.generations]
    assert len(visited) < 8
    assert torch.equal(forest.at(tree.leaves), unroll(curved, x, grid[visited], kernel).x)


def test_a_carry_is_gathered_and_joined_row_by_row() -> None:
    numbers, sigma = torch.arange(5.0), torch.arange(10.0).reshape(5, 2)
    whole = Carry((numbers[:, None], -numbers[:, None]), sigma)
    order = torch.tensor([3, 0, 4]), torch.tensor([1, 2])
    parts = [(Rows(rows, rows), whole.rows(Rows(rows, rows))) for rows in order]
    joined = Carry.joined(parts)
    assert joined is not None and torch.equal(joined.sigma, sigma)
    assert all(torch.equal(*pair) for pair in zip(joined.states, whole.states, strict=True))


# ---------------------------------------------------------------------------------------------- gradients


@EVERY_SOLVER
def test_an_unrolled_chain_has_the_values_of_the_rollout_and_its_gradient(kernel: Kernel) -> None:
    grid, x = scheduler_of("sana", 3.0, 5).sigmas, noise(2, 3, 2)
    assert torch.equal(torch.stack(unroll(curved, x, grid, kernel).states), rolled_out(kernel, curved, x, grid))

    def end(x: Tensor, theta: Tensor) -> Tensor:
        return unroll(lambda x, sigma, root: curved(x, sigma) * theta, x, grid.double(), kernel).x

    theta = torch.tensor(0.8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (x.double().requires_grad_(), theta))


@EVERY_SOLVER
@pytest.mark.parametrize("then", [0.2, 0.0])
@pytest.mark.parametrize("history", [0, 1, 2])
def test_the_velocity_coefficient_is_the_derivative_of_the_mean(kernel: Kernel, then: float, history: int) -> None:
    x, carry = noise(3, 2).double(), None
    for sigma, following in itertools.pairwise([0.95, 0.8, 0.5][2 - history :]):
        step = kernel(x, curved(x, torch.tensor(sigma)), sigma, following, TransitionContext(0.0, carry=carry))
        x, carry = step.mean, step.carry
    v = curved(x, torch.tensor(0.5)).requires_grad_()
    step = kernel(x, v, 0.5, then, TransitionContext(level=0.0, carry=carry))
    (slope,) = torch.autograd.grad(step.mean.sum(), v)
    torch.testing.assert_close(slope, step.policy.velocity_coef[:, None].expand_as(v))
    assert not bool(step.std.any()) and torch.equal(step.sample(torch.ones_like(x)), step.mean)


# ---------------------------------------------------------------------------------------------- refusals


@EVERY_SOLVER
def test_stochastic_levels_replays_and_other_paths_are_refused(kernel: Kernel) -> None:
    x, half = noise(2, 3), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"stochastic steps \(level 1\); expected level 0 .* samplers.Deterministic"):
        kernel(x, x, 0.7, 0.5)
    with pytest.raises(ValueError, match="draws no noise"):
        kernel.coefficients(half, half / 2, torch.tensor([0.0, 0.3]))
    with pytest.raises(ValueError, match=f"{type(kernel).__name__} steps .* does not store the history"):
        kernel(x, x, 0.7, 0.5, TransitionContext(level=0.0, replay=True))
    last = kernel(x, x, 0.7, 0.0, TransitionContext(level=0.0, replay=True))  # x̂0, whatever was before
    torch.testing.assert_close(last.mean, 0.3 * x)
    with pytest.raises(ValueError, match="rectified flow"):
        kernel.bind(VP)
    assert kernel.bind(FLOW) is kernel
