"""DPM-Solver++(2M): against the formula, diffusers, the exact ODE; in mixed frontiers and in replay."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from samplers import (
    CPS,
    DDIM,
    ODE,
    Carry,
    Compressed,
    Cost,
    DPMSolver,
    Fixed,
    FlowSDE,
    Forest,
    Kernel,
    KeyedNoise,
    Position,
    Sliding,
    TransitionContext,
    Tree,
    Window,
    chain,
    compressed,
    diffusers_sigmas,
    load_forest,
    plain_sigmas,
    rollout,
    save_forest,
    scattered,
    window,
)
from tests.helpers.kernels import F64, FLOW, VP, bed, rows

DETERMINISTIC = TransitionContext(level=0.0)


def curved(x: Tensor, sigma: Tensor, root: Tensor | None = None) -> Tensor:
    """Some velocity that is not affine, so that first and second order differ."""
    return torch.sin(3 * x) - 0.5 * x * torch.as_tensor(sigma).to(x).reshape(-1, *[1] * (x.ndim - 1))


def solve(kernel: Kernel, velocity, x: Tensor, grid: Tensor) -> Tensor:
    """All states of one chain, stepped by hand."""
    states, carry = [x], None
    for sigma, then in itertools.pairwise(grid):
        step = kernel(
            states[-1], velocity(states[-1], sigma.expand(len(x))), sigma, then, replace(DETERMINISTIC, carry=carry)
        )
        states.append(step.mean)
        carry = step.carry
    return torch.stack(states)


def by_formula(velocity, x: float, grid: list[float]) -> float:
    """The algorithm in plain numbers: λ = ln((1-σ)/σ), x_j = (σ_j/σ_{j-1})·x_{j-1} - (1-σ_j)(e^{-η_j} - 1)·D_j."""
    log_snr = [-math.inf if s == 1 else math.inf if s == 0 else math.log((1 - s) / s) for s in grid]
    before = None
    for j in range(1, len(grid)):
        s, then = grid[j - 1], grid[j]
        x0 = x - s * float(velocity(rows(x), torch.tensor([s], dtype=F64)))
        if then == 0:
            return x0
        d = x0
        if before is not None and log_snr[j - 2] > -math.inf:
            r = (log_snr[j] - log_snr[j - 1]) / (2 * (log_snr[j - 1] - log_snr[j - 2]))
            d = (1 + r) * x0 - r * before
        shrink = math.exp(-(log_snr[j] - log_snr[j - 1])) if log_snr[j - 1] > -math.inf else 0.0
        x = x - s * (x - x0) / s * (s - then) if s == 1 else then / s * x - (1 - then) * (shrink - 1) * d
        before = x0
    return x


# ---------------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("grid", [[0.9, 0.7, 0.6, 0.25, 0.0], [1.0, 0.9, 0.5, 0.2, 0.05], [0.8, 0.1]])
def test_a_chain_is_the_papers_formula(grid: list[float]) -> None:
    x = solve(DPMSolver(ODE()), curved, rows(0.3), torch.tensor(grid, dtype=F64))[-1]
    assert float(x) == pytest.approx(by_formula(curved, 0.3, grid), abs=1e-12)
    euler = solve(ODE(), curved, rows(0.3), torch.tensor(grid, dtype=F64))[-1]
    assert torch.equal(x, euler) == (len(grid) == 2)


@pytest.mark.parametrize("steps", [3, 8, 14])
def test_a_chain_is_diffusers_dpm_solver(steps: int) -> None:
    """diffusers takes first order at the end of short runs, as here at σ' = 0. The last σ is exactly 0."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    grid, x = scheduler.sigmas, torch.linspace(-2, 2, 12).reshape(3, 4)
    ours = solve(DPMSolver(CPS(0.7)), curved, x, grid)[-1]
    assert float(grid[-1]) == 0
    for sigma, timestep in zip(grid, scheduler.timesteps, strict=False):
        x = scheduler.step(curved(x, sigma), timestep, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", [FLOW, VP], ids=["flow", "vp"])
def test_a_point_mass_is_exact_at_any_step_size(path) -> None:
    """x̂0 = m always: (a·m + b·ε) goes to (a'·m + b'·ε), at any order."""
    velocity, _ = bed(path, 0.6, 0.0)
    grid = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.0], dtype=F64)
    eps = rows(-1.3, 0.4)
    kernel = DPMSolver(ODE()).bind(path)
    states = solve(kernel, velocity, path.add_noise(rows(0.6, 0.6), eps, 0.9), grid)
    for sigma, state in zip(grid, states, strict=True):
        torch.testing.assert_close(state, path.add_noise(rows(0.6, 0.6), eps, sigma), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "order"), [(ODE(), 1), (DPMSolver(ODE()), 2)], ids=["euler", "dpm"])
def test_order_of_convergence(kernel: Kernel, order: int) -> None:
    """Gaussian data: the exact flow keeps (x - (1-σ)m)/√V. From σ = 0.9 to 0.1, error ~ h^order."""
    velocity, marginal = bed(FLOW)
    start, errors, counts = 1.1, [], [32, 64, 128, 256]
    exact = 0.9 * 0.5 + math.sqrt(marginal(0.1) / marginal(0.9)) * (start - 0.1 * 0.5)
    for count in counts:
        end = solve(kernel, velocity, rows(start), torch.linspace(0.9, 0.1, count + 1, dtype=F64))[-1]
        errors.append(abs(float(end) - exact))
    velocity_coef = -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]
    assert order - 0.1 < velocity_coef < order + 0.1, (velocity_coef, errors)


def test_b_is_the_derivative_of_a_second_order_step() -> None:
    v = rows(0.3, -0.8).requires_grad_()
    ctx = TransitionContext(level=0.0, carry=Carry((rows(0.1, 0.2),), torch.tensor([0.8, torch.nan])))
    step = DPMSolver(FlowSDE())(rows(0.5, 0.6), v, 0.6, 0.4, ctx)
    (velocity_coef,) = torch.autograd.grad(step.mean.sum(), v)
    torch.testing.assert_close(step.policy.velocity_coef, velocity_coef[:, 0])
    assert float(velocity_coef[0]) < -0.2 and float(velocity_coef[1]) == pytest.approx(
        -0.2
    )  # without history: Euler's -h
    assert step.policy is step.behavior


def test_on_a_variance_preserving_path_first_order_is_ddim() -> None:
    kernel = DPMSolver(DDIM(1.0)).bind(VP)
    first, ddim = (k(rows(0.4), rows(-0.7), 0.7, 0.5, DETERMINISTIC) for k in (kernel, DDIM(1.0).bind(VP)))
    assert torch.equal(first.mean, ddim.mean) and first.carry is not None
    second = kernel(
        rows(0.4), rows(-0.7), 0.7, 0.5, replace(DETERMINISTIC, carry=Carry((rows(0.1),), torch.tensor([0.9])))
    )
    a, b, _, _ = VP.mix(torch.tensor([0.9, 0.7, 0.5], dtype=F64))
    log_snr = (a / b).log()
    r = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
    x0 = VP.x0_from_velocity(rows(0.4), rows(-0.7), 0.7)
    d = (1 + r) * x0 - r * 0.1
    torch.testing.assert_close(second.mean, b[2] / b[1] * 0.4 - a[2] * (torch.exp(log_snr[1] - log_snr[2]) - 1) * d)


# ---------------------------------------------------------------------------------------------- trees


def grow(tree: Tree, kernel: Kernel, grid: Tensor, dtype: torch.dtype = F64) -> Forest:
    noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (3,))
    return rollout(curved, noise.start(tree).to(dtype), grid, tree, kernel, noise.step, store_dtype=dtype)


def mixed() -> Tree:
    """Two groups of unlike shape: at every generation some rows are stochastic, some deterministic, some jump the grid,
    some have history and the roots' children have none."""
    one = Tree.from_parents(
        [-1, 0, 0, 1, 1, 2, 3, 4, 6, 8], [0, 1, 2, 2, 4, 4, 3, 6, 5, 6], [0, 1, 0, 1, 0, 0, 0, 0, 0, 0], 6
    )
    return Tree.cat([one, window(6, 3, 1, 2), window(6, 2, 0, 1, shared_start=False)])


@pytest.mark.parametrize("across_noise", [True, False])
def test_a_mixed_frontier_is_every_trajectory_by_itself(across_noise: bool) -> None:
    """Each end's path is walked alone in fp64, its deterministic steps by the formula on its own history."""
    grid, tree = 0.97 * plain_sigmas(6, 3.0).double(), mixed()
    kernel = DPMSolver(FlowSDE(0.7), across_noise=across_noise, prefix=True)
    forest = grow(tree, kernel, grid)
    noise = KeyedNoise(0, 0, [0, 1, 2], (3,))
    second_order = 0
    for end in set(range(len(tree))) - set(tree.evaluated.tolist()):
        path = [end]
        while int(tree.parent[path[0]]) >= 0:
            path.insert(0, int(tree.parent[path[0]]))
        x, history = forest.at(torch.tensor(path[:1])), None
        for up, node in itertools.pairwise(path):
            s, then = float(grid[tree.index[up]]), float(grid[tree.index[node]])
            v = curved(x, torch.tensor([s], dtype=F64))
            x0, stochastic = x - s * v, float(tree.level[node]) > 0
            plain = FlowSDE(0.7)(
                x, v, s, then, TransitionContext(level=float(tree.level[node]), step=tree.index[up : up + 1])
            )
            if stochastic:
                x = plain.sample(noise.step(tree, torch.tensor([node])).double())
            elif then == 0 or history is None:
                x = plain.mean
            else:
                log_snr = [math.log((1 - value) / value) for value in (history[0], s, then)]
                r = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
                x = then / s * x + (s - then) / s * ((1 + r) * x0 - r * history[1])
                second_order += 1
            history = None if stochastic and not across_noise else (s, x0)
        torch.testing.assert_close(x, forest.at(torch.tensor([end])), rtol=0, atol=1e-12)
    assert second_order == (18 if across_noise else 11)  # counted by hand on `mixed`


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [FlowSDE(0.7), CPS(0.7)], ids=["flow", "cps"])
def test_stochastic_edges_replay_and_deterministic_ones_are_refused(inner: Kernel, store: torch.dtype) -> None:
    tree = mixed()
    forest = grow(tree, DPMSolver(inner), diffusers_sigmas(6), store)
    edges = tree.edges.flip(0)
    parents, position = tree.distinct_parents(edges)
    step = forest.edge_steps(edges, curved(forest.at(parents), forest.sigma(parents)), position)
    assert torch.equal(step.log_prob(forest.at(edges)), forest.log_prob[edges])
    inner_tail = (tree.level == 0) & (tree.index < 6) & (tree.parent >= 0) & forest.kept[tree.parent]
    with pytest.raises(ValueError, match="does not store the history"):
        forest.edge_steps(inner_tail.nonzero()[0], torch.zeros(1, 3), torch.tensor([0]))


@pytest.mark.parametrize("across_noise", [True, False])
def test_before_a_stochastic_step_it_is_euler_and_after_the_last_one_second_order(across_noise: bool) -> None:
    """MixGRPO-Flash: the prefix is the ODE's bit for bit, so are the window's states those of the plain kernel; the tail
    is not. A deterministic step between two stochastic ones is Euler too. `prefix` makes the first steps DPM's."""
    grid = plain_sigmas(16)
    for tree in (window(16, 3, 5, 3), scattered(16, 3, {5, 8}), compressed(window(16, 3, 5, 3), 0.4)):
        solver = DPMSolver(FlowSDE(), across_noise=across_noise)
        ode, plain, solved = (grow(tree, kernel, grid, torch.float32) for kernel in (ODE(), FlowSDE(), solver))
        first = tree.parents_of_edges[:1]
        assert int(tree.index[first]) == 5 and torch.equal(solved.at(first), ode.at(first))
        trained = torch.cat([tree.parents_of_edges, tree.edges])
        assert torch.equal(solved.at(trained), plain.at(trained))
        assert float((solved.at(tree.leaves) - plain.at(tree.leaves)).abs().max()) > 1e-3
        early = grow(tree, replace(solver, prefix=True), grid, torch.float32)
        assert float((early.at(first) - ode.at(first)).abs().max()) > 1e-4


def test_without_a_stochastic_step_every_step_is_second_order() -> None:
    tree, grid = chain(6, 2), plain_sigmas(6).double()
    tree = replace(tree, level=torch.zeros_like(tree.level))
    forest = grow(tree, DPMSolver(ODE()), grid)
    start = KeyedNoise(0, 0, [0], (3,)).start(tree).double()
    torch.testing.assert_close(forest.at(tree.leaves), solve(DPMSolver(ODE()), curved, start, grid)[-1])


def test_stochastic_states_do_not_depend_on_the_solver_of_the_others() -> None:
    """Before any deterministic step matters, edges are those of the plain kernel; leaves are not."""
    tree = window(6, 3, 0, 2, shared_start=False)
    plain, solved = (grow(tree, kernel, plain_sigmas(6).double()) for kernel in (FlowSDE(), DPMSolver(FlowSDE())))
    assert torch.equal(plain.at(tree.edges), solved.at(tree.edges))
    assert float((plain.at(tree.leaves) - solved.at(tree.leaves)).abs().min()) > 1e-4
    assert plain.evaluations == solved.evaluations


def test_a_forest_of_the_solver_is_saved_and_read(tmp_path) -> None:
    forest = grow(window(4, 2, 1, 1), DPMSolver(CPS(0.6)).bind(FLOW), diffusers_sigmas(4), torch.float32)
    save_forest(tmp_path / "forest.safetensors", forest)
    assert load_forest(tmp_path / "forest.safetensors").kernel == DPMSolver(CPS(0.6), path=FLOW)


# ---------------------------------------------------------------------------------------------- sub-grids


@pytest.mark.parametrize("kernel", [FlowSDE(), DPMSolver(FlowSDE())], ids=["euler", "dpm"])
def test_an_n_step_completion_on_a_sub_grid_is_a_run_of_jumps(kernel: Kernel) -> None:
    """From a stochastic state at index 3 of 12: three children complete it in 1, 3 and 9 steps. Each equals the ODE
    solved alone on the grid that holds only its own levels, and costs exactly its own velocities."""
    routes = [[12], [6, 9, 12], list(range(4, 13))]
    parent, index, level = [-1, 0, 1, 2], [0, 1, 2, 3], [0.0, 1.0, 1.0, 1.0]
    for route in routes:
        up = 3
        for grid_index in route:
            parent.append(up)
            index.append(grid_index)
            level.append(0.0)
            up = len(parent) - 1
    tree, grid = Tree.from_parents(parent, index, level, 12), plain_sigmas(12).double()
    kernel = replace(kernel, across_noise=False) if isinstance(kernel, DPMSolver) else kernel
    forest = grow(tree, kernel, grid)
    start = forest.at((tree.index == 3).nonzero().flatten()[:1])
    ends = torch.cat([solve(kernel, curved, start, grid[[3, *route]])[-1] for route in routes])
    order = tree.generation[tree.leaves].argsort()
    torch.testing.assert_close(forest.at(tree.leaves[order]), ends, rtol=0, atol=1e-12)
    assert forest.evaluations == tree.cost().rollout == 3 + 1 + 2 + 8


# ---------------------------------------------------------------------------------------------- MixGRPO-Flash


def flash(ratio: float = 0.4, position: Position | None = None) -> Compressed:
    """MixGRPO-Flash's plan: a window of four of 25 steps that slides every 20 iterations; Flash*: ratio 0.2, Fixed()."""
    return Compressed(Window(4, position=position or Sliding(every=20, roll_back=True)), ratio)


def own_steps(tree: Tree) -> Tensor:
    """Grid indices at which one sample is evaluated, from its start."""
    node, found = int(tree.leaves[0]), list[int]()
    while int(tree.parent[node]) >= 0:
        node = int(tree.parent[node])
        found.insert(0, int(tree.index[node]))
    return torch.tensor(found)


def test_mixgrpo_flash_evaluates_a_sample_13_to_19_times() -> None:
    trees = [flash().tree(25, 12, iteration, np.random.default_rng(0)) for iteration in range(0, 240, 20)]
    counts = []
    for start, tree in enumerate(trees):
        steps, tail = own_steps(tree), math.ceil(round(0.4 * (21 - start), 9))
        assert steps[: start + 4].tolist() == list(range(start + 4)) and len(steps) == start + 4 + tail
        assert tree.cost() == Cost(start + 1 + 12 * (3 + tail), 1 + 12 * 3, 12 * 4, 12)
        assert tree.index[tree.leaves].unique().tolist() == [25] and float(plain_sigmas(25)[25]) == 0.0
        counts.append(len(steps))
    assert (counts[0], counts[-1]) == (13, 19) and sum(counts) / 12 == pytest.approx(16.08, abs=0.005)
    star = flash(0.2, Fixed()).tree(25, 12, 0, np.random.default_rng(0))
    assert len(own_steps(star)) == 9


@pytest.mark.parametrize("across_noise", [True, False])
@pytest.mark.parametrize("start", [0, 3, 11])
def test_mixgrpo_flash_step_by_step(start: int, across_noise: bool) -> None:
    """Prefix: Euler. Window: Flow-SDE, untouched. Tail: second order from its first step, whose history is the x̂0 of the
    last stochastic step; to σ' = 0 the jump to x̂0. Each sample walked alone in fp64."""
    tree = flash(position=Fixed(start)).tree(25, 3, 0, np.random.default_rng(0))
    grid, kernel = plain_sigmas(25).double(), DPMSolver(FlowSDE(), across_noise=across_noise)
    forest, noise = grow(tree, kernel, grid), KeyedNoise(0, 0, [0], (3,))
    plain = grow(tree, FlowSDE(), grid)
    trained = torch.cat([tree.parents_of_edges, tree.edges])
    assert torch.equal(forest.at(trained), plain.at(trained)) and torch.equal(
        forest.log_prob[tree.edges], plain.log_prob[tree.edges]
    )
    for end in tree.leaves.tolist():
        path = [end]
        while int(tree.parent[path[0]]) >= 0:
            path.insert(0, int(tree.parent[path[0]]))
        x, before = noise.start(tree).double(), None
        for up, node in itertools.pairwise(path):
            s, then = grid[tree.index[up]], grid[tree.index[node]]
            v = curved(x, s[None])
            x0, step = x - s * v, int(tree.index[up])
            if start <= step < start + 4:
                done = FlowSDE()(x, v, s, then, TransitionContext(1.0, step=tree.index[up : up + 1]))
                x = done.sample(noise.step(tree, torch.tensor([node])).double())
                before = (s, x0) if across_noise else None
            elif step < start or before is None or then == 0:
                x, before = x - (s - then) * v, (None if step < start else (s, x0))
            else:
                log_snr = [((1 - value) / value).log() for value in (before[0], s, then)]
                r = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
                d = (1 + r) * x0 - r * before[1]
                x, before = then / s * x - (1 - then) * ((log_snr[1] - log_snr[2]).exp() - 1) * d, (s, x0)
        torch.testing.assert_close(x, forest.at(torch.tensor([end])), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("across_noise", "shrinks", "order"),
    [(True, False, 2.0), (False, False, 2.0), (False, True, 2.0), (True, True, 1.5)],
)
def test_the_tail_after_prefix_and_window_is_of_second_order(across_noise: bool, shrinks: bool, order: float) -> None:
    """Gaussian data, whose exact flow is known: ODE prefix, one stochastic step, tail to σ = 0.1. Halving the tail's steps
    divides its error by four. If the stochastic step is halved too, the x̂0 taken over its noise, which is of order √h,
    costs half an order: across_noise is MixGRPO's choice, not the more accurate one."""
    velocity, marginal = bed(FLOW)
    errors, counts = [], [256, 512]
    for count in counts:
        tail = torch.linspace(0.8, 0.1, count + 1, dtype=F64)
        width = float(tail[0] - tail[1]) if shrinks else 0.1
        grid = torch.cat([torch.tensor([0.97, 0.95, 0.8 + width], dtype=F64), tail])
        tree = window(count + 3, 1, 2, 1, shared_start=False)
        kernel = DPMSolver(FlowSDE(), across_noise=across_noise)
        forest = rollout(velocity, rows(1.1), grid, tree, kernel, lambda tree, nodes: rows(5.0), store_dtype=F64)
        x, end = float(forest.at(tree.edges)), float(forest.at(tree.leaves))
        exact = 0.9 * 0.5 + math.sqrt(marginal(0.1) / marginal(0.8)) * (x - 0.2 * 0.5)
        errors.append(abs(end - exact))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.12), errors
