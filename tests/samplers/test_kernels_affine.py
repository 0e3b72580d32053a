"""Kernels that are affine in (x, v): golden values, point masses, Gaussian data, densities."""

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from samplers import (
    CPS,
    DDIM,
    ODE,
    ClippedFlowSDE,
    DanceSDE,
    FlowSDE,
    Kernel,
    KeyedNoise,
    LinearSDE,
    StepwiseSDE,
    TransitionContext,
    VariancePreserving,
    chain,
    plain_sigmas,
    rollout,
)
from tests.helpers.kernels import EULER_MARUYAMA, F64, FLOW, KERNELS, PRESERVING, VP, bed, moments, path_of, rows

X, V = rows(0.3), rows(-1.1)
FIRST = TransitionContext(step=torch.tensor([0]))  # the first step of a grid
STEPS = [(0.9, 0.1), (0.7, 0.5), (0.2, 0.1)]  # levels of both paths, far and near


# ---------------------------------------------------------------------------------------------- golden values


def test_golden_conversions_of_a_flow() -> None:
    """σ = 0.7, x = 0.3, v = -1.1."""
    assert float(FLOW.x0_from_velocity(X, V, 0.7)) == pytest.approx(1.07, abs=1e-12)
    assert float(FLOW.noise_from_velocity(X, V, 0.7)) == pytest.approx(-0.03, abs=1e-12)
    assert float(FLOW.score_from_velocity(X, V, 0.7)) == pytest.approx(0.04285714, abs=1e-8)


@pytest.mark.parametrize("predicted", ["noise", "velocity", "x0"])
def test_golden_ddim_from_all_three_predictions(predicted: str) -> None:
    """ᾱ = .5, ᾱ' = .8, η = .6, x = .3, ε = .4 or v = .25; an x0-model must give the same step."""
    path = VariancePreserving(torch.tensor([0.8, 0.5], dtype=F64))
    eps, x0 = (0.4, 0.02426407) if predicted == "noise" else (0.38890873, 0.03535534)
    v = {
        "noise": path.velocity_from_noise(X, rows(0.4), 1.0),
        "velocity": rows(0.25),
        "x0": path.velocity_from_x0(X, rows(0.3 * 0.5**0.5 - 0.25 * 0.5**0.5), 1.0),
    }[predicted]
    assert float(path.x0_from_velocity(X, v, 1.0)) == pytest.approx(x0, abs=1e-8)
    assert float(path.noise_from_velocity(X, v, 1.0)) == pytest.approx(eps, abs=1e-8)
    step = DDIM(0.6).bind(path)(X, v, 1.0, 0.5)
    mean, log_prob = (0.17454223, -0.44031922) if predicted == "noise" else (0.18022459, -0.40637061)
    got = [float(step.std), float(step.mean), float(step.log_prob(rows(0.5)))]
    np.testing.assert_allclose(got, [0.23237900, mean, log_prob], atol=1e-8)


@pytest.mark.parametrize("path", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("known", ["x0", "noise", "score", "velocity"])
def test_conversions_agree_and_invert(path, known: str) -> None:
    """From any of the four to the other three; all are those of the (x0, ε) that x was made of."""
    x0, eps, sigma = rows(0.7, -1.2), rows(-0.4, 0.9), torch.tensor([0.3, 0.8], dtype=F64)
    x = path.add_noise(x0, eps, sigma)
    a, b = path.a(sigma)[:, None], path.b(sigma)[:, None]
    truth = {"x0": x0, "noise": eps, "score": -eps / b, "velocity": path.velocity(x0, eps, sigma)}
    torch.testing.assert_close(a * x0 + b * eps, x)
    convert = {
        ("x0", "noise"): path.x0_from_noise, ("x0", "score"): path.x0_from_score,
        ("x0", "velocity"): path.x0_from_velocity, ("noise", "x0"): path.noise_from_x0,
        ("noise", "score"): path.noise_from_score, ("noise", "velocity"): path.noise_from_velocity,
        ("score", "x0"): path.score_from_x0, ("score", "noise"): path.score_from_noise,
        ("score", "velocity"): path.score_from_velocity, ("velocity", "x0"): path.velocity_from_x0,
        ("velocity", "noise"): path.velocity_from_noise, ("velocity", "score"): path.velocity_from_score,
    }  # fmt: skip
    for target in truth.keys() - {known}:
        torch.testing.assert_close(convert[target, known](x, truth[known], sigma), truth[target])


def test_golden_clipped_and_linear_steps() -> None:
    """At σ .7 -> .55 Flow-SDE has g = 1.06926766, s = .41412558: a bound of .45 does not act, one of .2 does."""
    free, flow = ClippedFlowSDE(0.7)(X, V, 0.7, 0.55), FlowSDE(0.7)(X, V, 0.7, 0.55)
    assert torch.equal(free.mean, flow.mean) and torch.equal(free.std, flow.std)
    assert float(ClippedFlowSDE(0.7, max_std=0.2)(X, V, 0.7, 0.55).std) == pytest.approx(0.2, abs=1e-15)
    # the first step: σ_1 stands for σ inside 1-σ, so s = min(a, c)
    assert float(ClippedFlowSDE(0.7)(X, V, 1.0, 0.9601, FIRST).std) == pytest.approx(0.45, abs=1e-12)
    assert float(ClippedFlowSDE(0.3)(X, V, 1.0, 0.9601, FIRST).std) == pytest.approx(0.3, abs=1e-12)
    # g = .1 + .8·.7 = .66: α = 1 - g²h/2σ, and μ = x - h·v - (hg²/2σ)·ε̂ with ε̂ = -0.03
    linear = LinearSDE(0.1, 0.9)(X, V, 0.7, 0.55)
    assert float(linear.mean) == pytest.approx(0.465 + 0.03 * 0.15 * 0.66**2 / 1.4, abs=1e-12)
    assert float(linear.std) == pytest.approx(0.66 * 0.15**0.5, abs=1e-12)


def test_golden_stepwise_step() -> None:
    """σ .7 -> .55, η = .7: x̂0 = 1.07, ε̂ = -.03, ς = .7·.55·√.3; x' = .45·x̂0 + √(.55²-ς²)·ε̂ + ς·z. From σ = 1 and to
    σ' = 0 there is no noise; with η = 1 and σ = 0+ all of it is new."""
    step, std = StepwiseSDE(0.7)(X, V, 0.7, 0.55), 0.7 * 0.55 * 0.3**0.5
    assert float(step.std) == pytest.approx(std, abs=1e-12)
    assert float(step.mean) == pytest.approx(0.45 * 1.07 - 0.03 * (0.55**2 - std**2) ** 0.5, abs=1e-12)
    first, last = StepwiseSDE(0.7)(X, V, 1.0, 0.9, FIRST), StepwiseSDE(0.7)(X, V, 0.2, 0.0)
    assert float(first.std) == float(last.std) == 0 and torch.allclose(first.mean, X - 0.1 * V)
    with pytest.raises(ValueError, match="density"):
        first.log_prob(X)
    assert float(StepwiseSDE(1.0)(X, V, 1e-6, 5e-7).std) == pytest.approx(5e-7, rel=1e-5)
    with pytest.raises(ValueError, match="lower the level"):
        StepwiseSDE(0.7)(X, V, 0.7, 0.5, TransitionContext(level=1.5))


@pytest.mark.parametrize(("sigma", "then"), [(0.9, 0.1), (0.7, 0.55), (0.278, 0.0089)])
def test_closed_forms_of_the_three_numbers(sigma: float, then: float) -> None:
    """α, b, s of each kernel as its paper's formula simplifies; Flow-SDE's first step of a grid too."""
    h, a, eta, angle = sigma - then, 0.7, 0.3, 0.35 * np.pi
    bounded = min(a * np.sqrt(sigma / (1 - sigma)), 0.45 / np.sqrt(h))
    own = {
        FlowSDE(a): (1 - a**2 * h / (2 * (1 - sigma)), -h * (1 + a**2 / 2), a * np.sqrt(sigma * h / (1 - sigma))),
        DanceSDE(eta): (1 - eta**2 * h / (2 * sigma), -h * (1 + eta**2 * (1 - sigma) / (2 * sigma)), eta * np.sqrt(h)),
        CPS(a): (
            1 - then + then * np.cos(angle), -sigma * (1 - then) + (1 - sigma) * then * np.cos(angle), then * np.sin(angle),
        ),
        ODE(): (1.0, -h, 0.0),
        ClippedFlowSDE(a): (
            1 - bounded**2 * h / (2 * sigma), -h * (1 + bounded**2 * (1 - sigma) / (2 * sigma)), bounded * np.sqrt(h),
        ),
    }  # fmt: skip
    for kernel, expected in own.items():
        got = kernel.coefficients(torch.tensor([sigma], dtype=F64), torch.tensor([then], dtype=F64))
        np.testing.assert_allclose([float(got.alpha), float(got.velocity_coef), float(got.std)], expected, rtol=1e-12)
    first = FlowSDE(a).coefficients(torch.ones(1, dtype=F64), torch.tensor([then], dtype=F64), 1.0, 0)
    got = [float(first.alpha), float(first.velocity_coef), float(first.std)]
    np.testing.assert_allclose(got, [1 - a**2 / 2, -(1 - then), a], rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.278, 0.25, 0.0089])
def test_a_last_step_of_flow_sde_leaves_its_noise_in_the_sample(sigma: float) -> None:
    """To σ' = 0, all data at m: the variance is (a²σ²/(1−σ))·(1 + a²/(4(1−σ))), where the ODE and CPS leave none."""
    velocity, _ = bed(FLOW, 0.6, 0.0)
    left = {
        kernel: moments(kernel, velocity, (1 - sigma) * 0.6, sigma**2, sigma, 0.0)
        for kernel in (FlowSDE(0.7), CPS(0.7), ODE())
    }
    for mean, _ in left.values():
        assert mean == pytest.approx(0.6, abs=1e-12)
    excess = 0.49 * sigma**2 / (1 - sigma) * (1 + 0.49 / (4 * (1 - sigma)))
    assert [variance for _, variance in left.values()] == pytest.approx([excess, 0, 0], abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_the_exact_kl_is_b_squared_over_two_s_squared_times_dv_squared(name: str) -> None:
    kernel, dv = KERNELS[name], rows(0.02, 0.3)
    x, v = rows(0.3, -0.5), rows(-1.1, 0.4)
    here, there = kernel(x, v, 0.7, 0.5), kernel(x, v + dv, 0.7, 0.5)
    b, s = here.policy.velocity_coef, here.std
    torch.testing.assert_close(here.kl(there, form="exact"), (b * dv[:, 0]) ** 2 / (2 * s**2))
    expected = torch.distributions.kl_divergence(Normal(here.mean, s[:, None]), Normal(there.mean, s[:, None])).sum(1)
    torch.testing.assert_close(here.kl(there, form="exact"), expected)


# ---------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", KERNELS)
def test_b_is_the_derivative_by_v_and_log_prob_the_normal_density(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, v, z = (torch.randn(3, 7, dtype=F64, generator=rng) for _ in range(3))
    v.requires_grad_()
    sigma, then = torch.tensor([0.9, 0.7, 0.2]).double(), torch.tensor([0.1, 0.5, 0.1]).double()
    kernel = KERNELS[name]
    step = kernel(x, v, sigma, then, TransitionContext(level=torch.tensor([1.0, 0.5, 1.0])))
    (velocity_coef,) = torch.autograd.grad(step.mean.sum(), v, retain_graph=True)
    b = kernel.coefficients(sigma, then, torch.tensor([1.0, 0.5, 1.0])).velocity_coef
    torch.testing.assert_close(velocity_coef, b[:, None].expand(3, 7))
    assert torch.equal(step.policy.velocity_coef, b)
    arrived = step.sample(z).detach()
    torch.testing.assert_close(
        step.log_prob(arrived) * 7, Normal(step.mean, step.std[:, None]).log_prob(arrived).sum(1)
    )


@pytest.mark.parametrize("name", KERNELS)
def test_without_noise_every_kernel_is_its_paths_ode(name: str) -> None:
    """Level -> 0 continuously, and level 0 exactly: Euler for a flow, DDIM with η = 0 for a VP path."""
    kernel, euler = KERNELS[name], ODE().bind(path_of(name))
    exact = euler(X, V, 0.7, 0.5).mean
    torch.testing.assert_close(kernel(X, V, 0.7, 0.5, TransitionContext(level=1e-7)).mean, exact, rtol=0, atol=1e-6)
    deterministic = kernel(X, V, 0.7, 0.5, TransitionContext(level=0.0))
    assert torch.equal(deterministic.mean, exact) and float(deterministic.std) == 0


@pytest.mark.parametrize(("sigma", "then"), STEPS)
@pytest.mark.parametrize("name", EULER_MARUYAMA)
def test_point_mass_excess_of_euler_maruyama(name: str, sigma: float, then: float) -> None:
    """All data at m: the mean is right, the variance σ'² + (g²h²/σ)(1 + g²/4σ)."""
    m, h, kernel = 0.6, sigma - then, EULER_MARUYAMA[name]
    velocity, _ = bed(FLOW, m, 0.0)
    mean, variance = moments(kernel, velocity, (1 - sigma) * m, sigma**2, sigma, then)
    g2 = float(kernel.coefficients(torch.tensor([sigma], dtype=F64), torch.tensor([then], dtype=F64)).std) ** 2 / h
    assert mean == pytest.approx((1 - then) * m, abs=1e-12)
    assert variance == pytest.approx(then**2 + g2 * h**2 / sigma * (1 + g2 / (4 * sigma)), rel=1e-10)


@pytest.mark.parametrize(("sigma", "then"), STEPS)
@pytest.mark.parametrize("name", PRESERVING)
def test_point_mass_is_exact_for_what_keeps_the_noise_at_any_step_size(name: str, sigma: float, then: float) -> None:
    path, m = path_of(name), 0.6
    velocity, marginal = bed(path, m, 0.0)
    a, a_next = (float(path.mix(torch.tensor(s, dtype=F64))[0]) for s in (sigma, then))
    mean, variance = moments(PRESERVING[name], velocity, a * m, marginal(sigma), sigma, then)
    assert mean == pytest.approx(a_next * m, abs=1e-12)
    assert variance == pytest.approx(marginal(then), rel=1e-10)


@pytest.mark.parametrize(("sigma", "then"), STEPS)
@pytest.mark.parametrize("name", PRESERVING)
def test_gaussian_data_map_of_what_keeps_the_noise_at_any_step_size(name: str, sigma: float, then: float) -> None:
    """The mean is exact; V goes to (a'·aδ²/V + e·b/V)²·V + s², e = √(b'² - s²): in closed form on either path."""
    path, kernel, (m, delta) = path_of(name), PRESERVING[name], (0.5, 0.8)
    velocity, marginal = bed(path, m, delta)
    a, b, _, _ = (float(t) for t in path.mix(torch.tensor(sigma, dtype=F64)))
    a_next, b_next, _, _ = (float(t) for t in path.mix(torch.tensor(then, dtype=F64)))
    mean, variance = moments(kernel, velocity, a * m, marginal(sigma), sigma, then)
    s = float(kernel(X, V, sigma, then).std)
    if name == "cps":
        assert s == pytest.approx(then * np.sin(0.35 * np.pi), rel=1e-10)
    elif name == "stepwise":
        assert s == pytest.approx(0.7 * then * np.sqrt(1 - sigma), rel=1e-10)
    else:
        assert s == pytest.approx(0.6 * np.sqrt((b_next / b) ** 2 * (1 - (a / a_next) ** 2)), rel=1e-10)
    now = marginal(sigma)
    gain = a_next * a * delta**2 / now + np.sqrt(b_next**2 - s**2) * b / now
    assert mean == pytest.approx(a_next * m, abs=1e-12)
    assert variance == pytest.approx(gain**2 * now + s**2, rel=1e-10)


@pytest.mark.parametrize("name", EULER_MARUYAMA)
def test_weak_order_one_of_euler_maruyama(name: str) -> None:
    """From the exact marginal at σ = 0.9 to 0.2: halving h halves the error of the variance.

    The bound of the clipped kernel is on s, so with small h it is Flow-SDE: fitted where it no longer acts."""
    velocity, marginal = bed(FLOW)
    errors, counts = [], [64, 128, 256, 512]
    for count in counts:
        mean, variance = 0.05, marginal(0.9)
        grid = torch.linspace(0.9, 0.2, count + 1, dtype=F64).tolist()
        for sigma, then in itertools.pairwise(grid):
            mean, variance = moments(EULER_MARUYAMA[name], velocity, mean, variance, sigma, then)
        errors.append(abs(variance - marginal(0.2)))
    order = -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]
    assert 0.9 < order < 1.1, errors


# ---------------------------------------------------------------------------------------------- the first step


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), ClippedFlowSDE(0.7, max_std=1.0)], ids=["flow", "clipped"])
@pytest.mark.parametrize("top", [1.0, 0.99999, 0.9998])
def test_the_first_step_goes_by_the_grid_index(kernel: FlowSDE, top: float) -> None:
    """UniPC's grids start just below 1: α = 1 - a²h/(2(1-σ')) and s = a√(σh/(1-σ')), near those from σ = 1."""
    sigma, then, a = torch.tensor([top], dtype=F64), torch.tensor([0.9643], dtype=F64), 0.7
    got, whole = (kernel.coefficients(s, then, 1.0, 0) for s in (sigma, torch.ones(1, dtype=F64)))
    h = top - 0.9643
    assert float(got.alpha) == pytest.approx(1 - a**2 * h / (2 * (1 - 0.9643)), rel=1e-12)
    assert float(got.std) == pytest.approx(a * (top * h / (1 - 0.9643)) ** 0.5, rel=1e-12)
    assert float(got.alpha) == pytest.approx(float(whole.alpha), abs=2e-3)
    later = kernel.coefficients(torch.tensor([0.7], dtype=F64), torch.tensor([0.55], dtype=F64), 1.0, 3)
    assert torch.equal(later.std, kernel(X, V, 0.7, 0.55).std)  # other steps do not read the index


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), ClippedFlowSDE(0.7)], ids=["flow", "clipped"])
def test_a_grid_cut_at_a_middle_level_has_the_steps_of_the_full_one(kernel: FlowSDE) -> None:
    first, later = kernel.coefficients(0.6, 0.45, 1.0, 0), kernel.coefficients(0.6, 0.45, 1.0, 2)
    assert torch.equal(first.std, later.std) and torch.equal(first.velocity_coef, later.velocity_coef)


@pytest.mark.parametrize("kernel", [FlowSDE(0.0), ClippedFlowSDE(0.0)], ids=["flow", "clipped"])
def test_without_a_noise_level_the_step_from_pure_noise_is_euler(kernel: FlowSDE) -> None:
    step = kernel.coefficients(1.0, 0.8)
    assert (float(step.alpha), float(step.std)) == (1.0, 0.0) and float(step.velocity_coef) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "kernel",
    [
        FlowSDE(0.7),
        ClippedFlowSDE(0.7),
        FlowSDE(0.7, sigma_cap=0.99),
        *(KERNELS[name] for name in KERNELS if name != "stepwise"),
    ],
)
def test_a_rollout_from_just_below_one_is_near_that_from_one(kernel: Kernel) -> None:
    path = VP if isinstance(kernel, DDIM) else FLOW
    velocity, _ = bed(path)
    tree, noise = chain(10, 4), KeyedNoise(0, 0, [0], (3,))
    ends = []
    for top in (1.0, 1.0 if path is VP else 0.99999):
        grid = torch.arange(10, -1, -1) / 10 if path is VP else plain_sigmas(10)
        grid[0] = top
        forest = rollout(velocity, noise.start(tree).double(), grid, tree, kernel, noise.step, store_dtype=F64)
        parents, position = tree.distinct_parents(tree.edges)
        step = forest.edge_steps(tree.edges, velocity(forest.at(parents), forest.sigma(parents)), position)
        assert torch.equal(step.log_prob(forest.at(tree.edges)), forest.log_prob[tree.edges])
        ends.append(forest.at(tree.leaves))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "order"),
    [
        (FlowSDE(0.7), 0.49), (ClippedFlowSDE(0.7), 0.49), (FlowSDE(0.6), 0.36), (FlowSDE(1.2), 1.0),
        (FlowSDE(0.7, sigma_cap=0.9), 1.0), (FlowSDE(0.7, sigma_cap=0.99), 1.0), (DanceSDE(0.3), 1.0), (LinearSDE(), 1.0),
    ],
)  # fmt: skip
def test_weak_order_of_euler_maruyama_from_pure_noise(kernel: Kernel, order: float) -> None:
    """From σ = 1 to 0.2 on Gaussian data the error of the variance falls as h^min(1, a²) where the first step of
    Flow-SDE has s = a whatever its length, and as h where a number caps g, or g is finite."""
    velocity, marginal = bed(FLOW)
    errors, counts = [], [4096, 8192, 16384, 32768]
    for count in counts:
        grid = torch.linspace(1.0, 0.2, count + 1, dtype=F64)
        one = kernel.coefficients(grid[:-1], grid[1:], torch.ones(count, dtype=F64), torch.arange(count))
        slope = velocity(torch.ones(count, 1, dtype=F64), grid[:-1]) - velocity(
            torch.zeros(count, 1, dtype=F64), grid[:-1]
        )
        variance = 1.0
        for gain, std in zip((one.alpha + one.velocity_coef * slope[:, 0]).tolist(), one.std.tolist(), strict=True):
            variance = gain**2 * variance + std**2
        errors.append(abs(variance - marginal(0.2)))
    fitted = -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]
    assert fitted == pytest.approx(order, abs=0.06), errors


# ---------------------------------------------------------------------------------------------- last steps, refusals


def test_the_last_step_of_ddim() -> None:
    """set_alpha_to_one=False: a step to the cleanest level has a small std; true: to σ = 0, x̂0 itself, no density."""
    small, none = DDIM(1.0).bind(VP)(X, V, 0.2, 0.1), DDIM(1.0).bind(VP)(X, V, 0.1, 0.0)
    assert 0 < float(small.std) < 0.2 and bool(small.log_prob(X).isfinite().all())
    assert float(none.std) == 0
    torch.testing.assert_close(none.mean, VP.x0_from_velocity(X, V, 0.1))
    with pytest.raises(ValueError, match="density"):
        none.log_prob(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(1.0).bind(VP)(X, V, 0.7, 0.5, TransitionContext(level=2.0)),
        lambda: CPS(0.7)(X, V, 0.7, 0.5, TransitionContext(level=2.0)),
        lambda: ClippedFlowSDE(max_std=0.0),
        lambda: ClippedFlowSDE(sigma_cap=1.0),
        lambda: LinearSDE(0.5, 0.2),
        lambda: LinearSDE().bind(VP),
        lambda: DDIM().bind(FLOW),
        lambda: VP.x0_from_velocity(X, V, 0.55),
        lambda: FlowSDE()(X, V, 1.0, 0.9),  # infinite noise, unless it is known to be the first step
        lambda: ClippedFlowSDE()(X, V, 1.0, 0.9),
    ],
)
def test_bad_input_says_what_to_do(make) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        make()
