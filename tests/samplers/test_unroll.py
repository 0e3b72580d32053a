"""The rollout with a graph: the values of `rollout`, the gradients of closed forms, by method."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samplers import (
    CPS,
    ODE,
    DanceSDE,
    DPMSolver,
    FlowSDE,
    Kernel,
    KeyedNoise,
    RectifiedFlow,
    chain,
    plain_sigmas,
    rollout,
    scattered,
    stopped,
    straight_through,
    unroll,
)
from tests.helpers.gaussian import gaussian_velocity
from tests.helpers.kernels import F64, VP, bed

STEPS = 6
GRID = plain_sigmas(STEPS, 3.0).double()
GAPS = (GRID[:-1] - GRID[1:]).tolist()
_, SLOPE = gaussian_velocity()
SLOPES = [float(SLOPE(sigma)) for sigma in GRID[:-1]]


def shifted(theta: Tensor):
    """The exact velocity of Gaussian data plus one parameter per level."""
    velocity, _ = gaussian_velocity()
    levels = GRID.tolist()

    def moved(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return velocity(x, sigma) + theta[levels.index(float(sigma[0]))]

    return moved


def derivative(grid: Tensor = GRID, kernel: Kernel | None = None, **arguments) -> list[float]:
    """∂x_T/∂θ_k for each step k, of one row with one element."""
    theta = torch.linspace(-0.2, 0.3, STEPS, dtype=F64).requires_grad_()
    out = unroll(shifted(theta), torch.tensor([[0.7]], dtype=F64), grid, kernel or ODE(), **arguments)
    (gradient,) = torch.autograd.grad(out.x.sum(), theta)
    return gradient.tolist()


def through(step: int, scale: float = 1.0, cut: tuple[int, ...] = ()) -> float:
    """-Δ_k·Π_{j>k}(1 - Δ_j·A_j), where ∂v_j/∂x counts `scale` at the steps `cut`."""
    factors = [1 - GAPS[j] * SLOPES[j] * (scale if j in cut else 1.0) for j in range(step + 1, STEPS)]
    return -GAPS[step] * float(np.prod(factors))


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kernel", [ODE(), FlowSDE(0.7), DanceSDE(0.3), CPS(0.7), DPMSolver(FlowSDE(0.7))], ids=str)
def test_values_are_those_of_the_rollout_bit_for_bit(kernel: Kernel, dtype: torch.dtype) -> None:
    velocity, _ = gaussian_velocity()
    for topology in (
        chain(STEPS, 3),
        scattered(STEPS, 3, (1, 2), shared_start=False),
        scattered(STEPS, 3, (), shared_start=False),
    ):
        noise, grid = KeyedNoise(0, 0, [0], (2, 2)), plain_sigmas(STEPS, 3.0)
        start = noise.start(topology).to(dtype)
        forest = rollout(velocity, start, grid, topology, kernel, noise.step, store_dtype=dtype, keep="all")
        draws = {
            step: noise.step(topology, nodes).to(dtype)
            for step, nodes in enumerate(topology.generations[1:])
            if bool((topology.level[nodes] > 0).all())
        }
        out = unroll(velocity, start, grid, kernel, draws)
        for state, nodes in zip(out.states, topology.generations, strict=True):
            assert torch.equal(state, forest.at(nodes))
        assert len(out.velocities) == STEPS and torch.equal(out.x, out.states[-1])


def test_every_step_says_which_row_each_state_descends_from() -> None:
    """The row of the conditions, as in `rollout`."""
    seen = []

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        seen.append(root.tolist())
        return 0 * x

    unroll(velocity, torch.zeros(3, 1), GRID, ODE())
    assert seen == [[0, 1, 2]] * STEPS


def test_a_multistep_kernel_is_given_what_its_last_step_passed_on() -> None:
    """The second-order step of DPM-Solver++ in closed form, with its gradient in the start."""
    velocity, _ = gaussian_velocity()
    grid = torch.tensor([0.9, 0.6, 0.3], dtype=F64)

    def by_hand(x: Tensor) -> Tensor:
        v = velocity(x, grid[0])
        x1, before = x - 0.3 * v, x - 0.9 * v
        v1 = velocity(x1, grid[1])
        log_snr = ((1 - grid) / grid).log()
        ratio = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
        return x1 - 0.3 * v1 + (0.7 - 0.4 * 0.3 / 0.6) * ratio * (x1 - 0.6 * v1 - before)

    x = torch.tensor([[0.4], [-1.0]], dtype=F64, requires_grad=True)
    found, expected = unroll(velocity, x, grid, DPMSolver(ODE())).x, by_hand(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(end.sum(), x)[0] for end in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- gradients, by method


def test_full_back_propagation_is_the_product_of_all_jacobians() -> None:
    assert derivative() == pytest.approx([through(step) for step in range(STEPS)], abs=1e-12)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_draft_k_is_the_same_for_the_last_k_steps(last: int) -> None:
    expected = [through(step) if step >= STEPS - last else 0.0 for step in range(STEPS)]
    assert derivative(active=range(STEPS - last, STEPS)) == pytest.approx(expected, abs=1e-12)


def test_the_state_passes_a_step_without_graph_by_its_arithmetic_alone() -> None:
    """v is a constant there, so the ODE's factor is 1 (AlignProp's random cut)."""
    expected = [
        -GAPS[step] * float(np.prod([1 - GAPS[j] * SLOPES[j] for j in range(step + 1, STEPS) if j in (1, 4)]))
        for step in (1, 4)
    ]
    found = derivative(active={1, 4})
    assert [found[1], found[4]] == pytest.approx(expected, abs=1e-12)
    assert [found[step] for step in (0, 2, 3, 5)] == [0.0] * 4


@pytest.mark.parametrize("step", [0, 3, 5])
def test_refl_scores_the_prediction_of_one_step(step: int) -> None:
    expected = [-float(GRID[step]) if k == step else 0.0 for k in range(STEPS)]
    assert derivative(stopped(GRID, step), active={step}) == pytest.approx(expected, abs=1e-12)


def test_drtune_cuts_every_input_of_the_network() -> None:
    expected = [-GAPS[k] if k in (0, 2) else -float(GRID[4]) if k == 4 else 0.0 for k in range(STEPS)]
    assert derivative(stopped(GRID, 4), active={0, 2, 4}, cut=range(5)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_a_cut_scales_the_jacobian_of_its_step_only(scale: float) -> None:
    found = derivative(cut={2, 3}, cut_scale=scale)
    assert found == pytest.approx([through(step, scale, (2, 3)) for step in range(STEPS)], abs=1e-12)


def test_leap_align_is_two_leaps() -> None:
    """The values are the true states, the gradients those of the leaps k → j → T."""
    k, j, alpha = 1, 4, 0.3
    theta = torch.zeros(STEPS, dtype=F64, requires_grad=True)
    velocity, x = shifted(theta), torch.tensor([[0.7]], dtype=F64)
    with torch.no_grad():
        true = unroll(velocity, x, GRID, ODE()).states
    leap = unroll(velocity, true[k], GRID[[k, j]], ODE()).x
    middle = straight_through(true[j], leap)
    end = straight_through(true[-1], unroll(velocity, middle, GRID[[j, STEPS]], ODE(), cut={0}, cut_scale=alpha).x)
    assert torch.equal(middle, true[j]) and torch.equal(end, true[-1])
    (found,) = torch.autograd.grad(end.sum(), theta)
    expected = torch.zeros(STEPS, dtype=F64)
    expected[k] = -(GRID[k] - GRID[j]) * (1 - alpha * GRID[j] * SLOPES[j])
    expected[j] = -GRID[j]
    torch.testing.assert_close(found, expected)


def test_draft_lv_takes_the_last_step_again_from_more_noise() -> None:
    theta = torch.zeros(STEPS, dtype=F64, requires_grad=True)
    velocity, copies = shifted(theta), 3
    end = unroll(velocity, torch.tensor([[0.7]], dtype=F64), GRID, ODE(), active={STEPS - 1}).x
    eps = torch.linspace(-1, 1, copies, dtype=F64)[:, None]
    again = RectifiedFlow().add_noise(end.detach().expand(copies, 1), eps, GRID[-2])
    total = unroll(velocity, again, GRID[-2:], ODE()).x.sum()
    (found,) = torch.autograd.grad(total, theta)
    torch.testing.assert_close(found[-1], -copies * GRID[-2])
    assert not bool(found[:-1].any())


@pytest.mark.parametrize("kernel", [ODE(), FlowSDE(0.7), CPS(0.7), DPMSolver(FlowSDE(0.7))], ids=str)
def test_the_gradient_in_start_and_step_noise_is_that_of_finite_differences(kernel: Kernel) -> None:
    """ReNO, and its extension to the noise of the steps."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    for number, parameter in enumerate(net.parameters()):
        parameter.data = torch.linspace(-0.6, 0.7, parameter.numel(), dtype=F64).reshape(parameter.shape) * (1 + number)
        parameter.requires_grad_(False)

    def end(start: Tensor, *draws: Tensor) -> Tensor:
        noise = dict(enumerate(draws))
        return unroll(
            lambda x, s, r: net(torch.cat([x, s.to(x)[:, None]], 1)), start, GRID[[0, 2, 4, 6]], kernel, noise
        ).x

    inputs = torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 2, 2).unbind()
    inputs = tuple(part.clone().requires_grad_() for part in inputs)
    assert torch.autograd.gradcheck(end, inputs)


@pytest.mark.parametrize("kernel", [ODE(), DPMSolver(ODE())], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"active": (1, 2)}, {"cut": (0, 2)}, {"active": (0, 2), "cut": (2,)}], ids=str
)
def test_checkpointing_gives_the_same_gradient_and_runs_active_steps_twice(kernel: Kernel, arguments) -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    calls = []

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return net(torch.cat([x, sigma.to(x)[:, None]], 1))

    results = {}
    for checkpoint in (False, True):
        x = torch.tensor([[0.4], [-1.0]], dtype=F64, requires_grad=True)
        calls.clear()
        out = unroll(velocity, x, GRID[[0, 2, 4, 6]], kernel, checkpoint=checkpoint, **arguments)
        gradients = torch.autograd.grad(out.x.square().sum(), [x, *net.parameters()])
        results[checkpoint] = (out.x, *gradients)
        assert len(calls) == 3 + (len(arguments.get("active", range(3))) if checkpoint else 0)
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)


def test_on_a_variance_preserving_path_too() -> None:
    velocity, _ = bed(VP)
    grid, x = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=F64), torch.tensor([[0.4]], dtype=F64, requires_grad=True)
    kernel = ODE().bind(VP)
    (found,) = torch.autograd.grad(unroll(velocity, x, grid, kernel).x.sum(), x)
    ends = [unroll(velocity, torch.tensor([[value]], dtype=F64), grid, kernel).x for value in (0.0, 1.0)]
    torch.testing.assert_close(found, ends[1] - ends[0])  # the map is affine


# ---------------------------------------------------------------------------------------------- graphs, refusals


def test_no_graph_where_none_is_asked_for() -> None:
    theta = torch.zeros(STEPS, dtype=F64, requires_grad=True)
    x = torch.tensor([[0.7]], dtype=F64)
    out = unroll(shifted(theta), x, GRID, ODE(), active={4})
    assert [state.requires_grad for state in out.states] == [False] * 5 + [True] * 2
    assert [v.requires_grad for v in out.velocities] == [step == 4 for step in range(STEPS)]
    with torch.no_grad():
        assert not unroll(shifted(theta), x, GRID, ODE()).x.requires_grad


def test_what_cannot_be_is_refused() -> None:
    velocity, _ = gaussian_velocity()
    x = torch.zeros(2, 1, dtype=F64)
    for arguments, match in (
        ({"active": {6}}, r"active at steps \[6\]"),
        ({"cut": {-1}}, r"cut at steps \[-1\]"),
        ({"noise": {7: x}}, r"noise at steps \[7\]"),
        ({"noise": {0: x[:1]}}, "at step 0"),
        ({"cut": {0}, "cut_scale": 1.5}, "cut_scale=1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            unroll(velocity, x, GRID, ODE(), **arguments)
    with pytest.raises(ValueError, match="rows first"):
        unroll(velocity, x[:, 0], GRID, ODE())
    with pytest.raises(ValueError, match="equal shapes"):
        unroll(lambda x, s, r: x[:1], x, GRID, ODE())
    with pytest.raises(ValueError, match="step=6"):
        stopped(GRID, 6)
