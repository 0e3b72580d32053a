"""Kernels, noise, plans and the engine against closed forms."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from samplers import (
    CPS,
    ODE,
    Chain,
    DanceSDE,
    Fixed,
    FlowSDE,
    KeyedNoise,
    Random,
    Sliding,
    TransitionContext,
    Tree,
    Window,
    chain,
    diffusers_sigmas,
    dynamic_sigmas,
    generator,
    normal,
    plain_sigmas,
    rollout,
    window,
)
from tests.helpers.gaussian import gaussian_velocity

F64 = torch.float64
X, V, NEXT = (torch.tensor([[value]], dtype=F64) for value in (0.3, -1.1, 0.5))
KERNELS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7, constants="full")]
IDS = ["flow", "dance", "cps"]


# ---------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("kernel", "mean", "std", "log_prob"),
    [
        (FlowSDE(0.7), 0.46867500, 0.41412558, -0.04021333),
        (DanceSDE(0.3), 0.46528929, 0.11618950, 1.18897079),
        (CPS(0.7, constants="full"), 0.47400916, 0.49005359, -0.20710445),
        (CPS(0.7), 0.47400916, 0.49005359, -0.00067552),
    ],
    ids=["flow", "dance", "cps full", "cps none"],
)
def test_golden_steps(kernel, mean: float, std: float, log_prob: float) -> None:
    step = kernel(X, V, 0.7, 0.55)
    got = [float(step.mean), float(step.std), float(step.log_prob(NEXT))]
    np.testing.assert_allclose(got, [mean, std, log_prob], atol=1e-8)


def test_golden_euler_and_first_step() -> None:
    assert float(ODE()(X, V, 0.7, 0.55).mean) == pytest.approx(0.465, abs=1e-12)
    first = FlowSDE(0.7)(X, V, 1.0, 0.9601, TransitionContext(step=torch.tensor([0])))
    np.testing.assert_allclose([float(first.mean), float(first.std)], [0.27039, 0.7], atol=1e-8)


@pytest.mark.parametrize(
    ("kernel", "exact"), [(FlowSDE(0.7), 4.067121e-5), (DanceSDE(0.3), 3.463146e-4), (CPS(0.7), 4.800613e-5)], ids=IDS
)
def test_golden_kl(kernel, exact: float) -> None:
    here, there = kernel(X, V, 0.7, 0.55), kernel(X, V + 0.02, 0.7, 0.55)
    assert float(here.kl(there, form="exact")) == pytest.approx(exact, rel=1e-6)
    assert float(here.kl(there, form="exact_times_h")) == pytest.approx(0.15 * exact, rel=1e-6)
    assert float(here.kl(there, form="velocity")) == pytest.approx(4e-4, rel=1e-6)
    assert float(here.kl(there, form="mean_sq")) == pytest.approx(2 * float(here.std) ** 2 * exact, rel=1e-6)


@pytest.mark.parametrize("sigma_next", [0.96, 0.55, 0.05])
def test_the_exact_kl_is_that_of_cps_code_and_times_h_is_h_of_it(sigma_next: float) -> None:
    """The released code divides mean(Δμ²) by 2·(σ'·sin(aπ/2))², though its log-prob has no such factor."""
    a, dv, sigma = 0.7, torch.tensor([[0.02, -0.3, 0.1]], dtype=F64), sigma_next + 0.03
    x, v = torch.tensor([[0.3, -1.0, 0.8]], dtype=F64), torch.tensor([[-1.1, 0.4, 0.2]], dtype=F64)
    here, there = (CPS(a)(x, velocity, sigma, sigma_next) for velocity in (v, v + dv))
    code = ((here.mean - there.mean) ** 2).mean() / (2 * (sigma_next * np.sin(a * np.pi / 2)) ** 2)
    b = -sigma * (1 - sigma_next) + (1 - sigma) * sigma_next * np.cos(a * np.pi / 2)
    closed = (b**2 * dv**2).mean() / (2 * (sigma_next * np.sin(a * np.pi / 2)) ** 2)
    assert CPS(a).constants == "none"
    assert float(here.kl(there, form="exact")) == pytest.approx(float(code), rel=1e-12)
    assert float(here.kl(there, form="exact")) == pytest.approx(float(closed), rel=1e-9)
    assert float(here.kl(there, form="exact_times_h")) == pytest.approx(0.03 * float(code), rel=1e-12)


def test_schedules() -> None:
    plain = [1, 0.9643, 0.9231, 0.875, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
    double = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    np.testing.assert_allclose(plain_sigmas(10, 3.0), plain, atol=5e-5)
    np.testing.assert_allclose(diffusers_sigmas(10, 3.0), double, atol=5e-5)
    for steps in (1, 4, 10, 28):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        assert torch.equal(diffusers_sigmas(steps, 3.0), scheduler.sigmas)
    first = np.exp(0.63) / (np.exp(0.63) + (1 / 0.75 - 1))
    assert float(dynamic_sigmas(4, 1024)[1]) == pytest.approx(first, rel=1e-5)


# ---------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_log_prob_is_the_normal_density_and_its_gradient_is_b_z_over_s_d(kernel) -> None:
    rng = torch.Generator().manual_seed(0)
    x, v, z = (torch.randn(3, 7, dtype=F64, generator=rng) for _ in range(3))
    v.requires_grad_()
    step = kernel(x, v, 0.7, 0.55)
    arrived = step.sample(z).detach()
    log_prob = step.log_prob(arrived)
    torch.testing.assert_close(log_prob * 7, Normal(step.mean, step.std[:, None]).log_prob(arrived).sum(1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), v)
    torch.testing.assert_close(gradient, step.policy.velocity_coef[:, None] * z / (step.std[:, None] * 7))


@pytest.mark.parametrize("kernel", [*KERNELS, CPS(0.7), FlowSDE(0.7, reduce="sum")], ids=str)
def test_log_ratio_is_the_difference_of_log_probs_with_less_rounding(kernel) -> None:
    """In float64 the two agree; in fp32 the rounding of the means is left, not that of two numbers of order 1."""
    rng = torch.Generator().manual_seed(0)
    x, v, z = (torch.randn(300, 50, dtype=F64, generator=rng) for _ in range(3))
    near = v + 1e-3 * torch.randn(300, 50, dtype=F64, generator=rng)
    here, there = kernel(x, v, 0.7, 0.55), kernel(x, near, 0.7, 0.55)
    arrived = there.sample(z)
    exact = here.log_prob(arrived) - there.log_prob(arrived)
    torch.testing.assert_close(here.log_ratio(there, arrived), exact, rtol=1e-9, atol=1e-12)
    assert not here.log_ratio(here, arrived).any()
    one, other = (kernel(x.float(), velocity.float(), 0.7, 0.55) for velocity in (v, near))
    ratio = one.log_ratio(other, arrived.float())
    difference = one.log_prob(arrived.float()) - other.log_prob(arrived.float())
    assert float((ratio - exact).abs().mean()) < 0.7 * float((difference - exact).abs().mean())
    with pytest.raises(ValueError, match="one step under two velocities"):
        here.log_ratio(kernel(x, v, 0.7, 0.5), arrived)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_no_rows_have_no_log_probs(reduce) -> None:
    """A process of several may have padding only: its last micro-batch then holds a state and no trained step."""
    step = FlowSDE(reduce=reduce)(torch.zeros(0, 3), torch.zeros(0, 3), 0.7, 0.55)
    assert step.log_prob(torch.zeros(0, 3)).shape == step.kl(step).shape == (0,)


@pytest.mark.parametrize("kernel", [FlowSDE(1e-7), DanceSDE(1e-7), CPS(1e-7)], ids=IDS)
def test_without_noise_every_kernel_is_euler(kernel) -> None:
    torch.testing.assert_close(kernel(X, V, 0.7, 0.55).mean, ODE()(X, V, 0.7, 0.55).mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.5), (0.7, 0.55), (0.3, 0.1)])
def test_point_mass_data(sigma: float, sigma_next: float) -> None:
    """CPS reproduces N((1-σ')m, σ'²) for any step; Euler-Maruyama has an exact excess variance."""
    m, h = 0.6, sigma - sigma_next
    for kernel in (CPS(0.7), FlowSDE(0.7), DanceSDE(0.3)):
        ends = [kernel(torch.tensor([[x]], dtype=F64), torch.tensor([[(x - m) / sigma]], dtype=F64), sigma, sigma_next)
                for x in ((1 - sigma) * m, (1 - sigma) * m + sigma)]  # fmt: skip
        mean, std = float(ends[0].mean), float(ends[0].std)
        gain = float(ends[1].mean) - mean
        assert mean == pytest.approx((1 - sigma_next) * m, abs=1e-12)
        g2 = 0.0 if isinstance(kernel, CPS) else std**2 / h
        excess = (g2 * h * h / sigma) * (1 + g2 / (4 * sigma))
        assert gain**2 + std**2 == pytest.approx(sigma_next**2 + excess, abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=IDS[:2])
def test_weak_order_one_of_the_euler_maruyama_kernels(kernel) -> None:
    """From the exact marginal at σ = 0.9 to 0.2: halving h halves the error of the variance (exact recursion).

    Not CPS: its noise does not shrink with h, and each step loses AB(1-cosφ)²/(A+B) of the variance."""
    _, velocity_coef = gaussian_velocity()
    marginal = lambda sigma: (1 - sigma) ** 2 * 0.8**2 + sigma**2  # noqa: E731
    errors = []
    for steps in (64, 128, 256, 512):
        grid = torch.linspace(0.9, 0.2, steps + 1, dtype=F64)
        one = kernel.coefficients(grid[:-1], grid[1:], torch.ones(steps, dtype=F64))
        pull = one.alpha + one.velocity_coef * velocity_coef(grid[:-1])
        variance = marginal(0.9)
        for i in range(steps):
            variance = float(pull[i]) ** 2 * variance + float(one.std[i]) ** 2
        errors.append(abs(variance - marginal(0.2)))
    order = -np.polyfit(np.log2([64, 128, 256, 512]), np.log2(errors), 1)[0]
    assert 0.95 < order < 1.05


def test_cps_step_on_gaussian_data_loses_exactly_its_known_variance() -> None:
    _, velocity_coef = gaussian_velocity()
    sigma = torch.tensor([0.6], dtype=F64)
    one = CPS(0.7).coefficients(sigma, sigma - 1e-9, torch.ones(1, dtype=F64))
    a, b = 0.4**2 * 0.8**2, 0.6**2
    after = float(one.alpha + one.velocity_coef * velocity_coef(sigma)) ** 2 * (a + b) + float(one.std) ** 2
    assert a + b - after == pytest.approx(a * b * (1 - np.cos(0.35 * np.pi)) ** 2 / (a + b), abs=1e-7)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_gaussian_bed_moments(kernel) -> None:
    """Mean and variance of seven steps: exact recursion against sampling."""
    velocity, velocity_coef = gaussian_velocity()
    count = 40_000
    x = normal((count, 1), 0, "start").double()
    grid = plain_sigmas(8, 3.0)
    mean, variance = 0.0, 1.0
    for i in range(7):
        ctx = TransitionContext(step=torch.full((count,), i))
        step = kernel(x, velocity(x, grid[i].expand(count)), grid[i], grid[i + 1], ctx)
        x = step.sample(normal((count, 1), 0, "step", i).double())
        one = kernel.coefficients(grid[i : i + 1].double(), grid[i + 1 : i + 2].double(), 1.0, i)
        a, b, s, k, sigma = (
            float(one.alpha),
            float(one.velocity_coef),
            float(one.std),
            float(velocity_coef(grid[i].double())),
            float(grid[i]),
        )
        mean = a * mean + b * (-0.5 + k * (mean - (1 - sigma) * 0.5))
        variance = (a + b * k) ** 2 * variance + s**2
    assert float(x.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance / count))
    assert float(x.var()) == pytest.approx(variance, rel=4 * np.sqrt(2 / count))


@pytest.mark.parametrize(
    ("kernel", "golden"), list(zip(KERNELS, [-0.718433, -0.722591, -0.711316], strict=True)), ids=IDS
)
def test_policy_gradient_golden(kernel, golden: float) -> None:
    """dE[x_T]/dθ for v* + θ, plain grid T=10, k=3, last step ODE: closed form, and REINFORCE through rollout."""
    velocity, velocity_coef = gaussian_velocity()
    grid = plain_sigmas(10, 3.0)
    exact = grid.double()
    level = torch.ones(10, dtype=F64)
    level[9] = 0.0
    c = kernel.coefficients(exact[:-1], exact[1:], level, torch.arange(10))
    pulls = c.alpha + c.velocity_coef * velocity_coef(exact[:-1])
    analytic = sum(float(c.velocity_coef[i] * pulls[i + 1 :].prod()) for i in range(9))
    assert analytic == pytest.approx(golden, abs=1e-5)
    groups = 4000
    tree = chain(10, groups)
    noise = KeyedNoise(3, 0, [0], (16,))  # 16 independent coordinates a root: 64,000 one-dimensional paths
    forest = rollout(velocity, noise.start(tree), grid, tree, kernel, noise.step)
    edges = tree.edges
    parents, position = tree.distinct_parents(edges)
    step = forest.edge_steps(edges, velocity(forest.at(parents), forest.sigma(parents)), position)
    score = (step.policy.velocity_coef / step.std)[:, None] * (forest.at(edges) - step.mean) / step.std[:, None]
    total = torch.zeros(groups, 16).index_add_(0, tree.root[edges], score.float())
    reward = forest.at(tree.leaves)[tree.root[tree.leaves].argsort()]
    samples = (total * (reward - reward.mean())).flatten()
    assert float(samples.mean()) == pytest.approx(analytic, abs=4 * float(samples.std()) / np.sqrt(samples.numel()))


# ---------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_replay_is_exact_after_the_storage_cast(kernel, store: torch.dtype) -> None:
    velocity, _ = gaussian_velocity()
    tree = Tree.cat([window(8, 4, 1, 3), chain(8, 3)])
    noise = KeyedNoise(0, 0, [5, 6], (3, 4))
    forest = rollout(velocity, noise.start(tree), diffusers_sigmas(8), tree, kernel, noise.step, store_dtype=store)
    parents, position = tree.distinct_parents(tree.edges)
    step = forest.edge_steps(tree.edges, velocity(forest.at(parents), forest.sigma(parents)), position)
    assert float((step.log_prob(forest.at(tree.edges)) - forest.log_prob[tree.edges]).abs().max()) <= 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("steps", "group", "start", "size"), [(10, 24, 4, 2), (6, 8, 0, 1), (5, 3, 2, 3), (1, 2, 0, 1)]
)
def test_evaluations_equal_a_brute_force_enumeration(
    steps: int, group: int, start: int, size: int, shared: bool
) -> None:
    tree = window(steps, group, start, size, shared_start=shared)
    states = {(0, ()) if shared else (0, (member,)) for member in range(group)}  # (grid index, the sample's own draws)
    evaluated, trained = set(), set()
    for member in range(group):
        draws: tuple = () if shared else (member,)
        for i in range(steps):
            evaluated.add((i, draws))
            if start <= i < start + size:
                trained.add((i, draws))
                draws = (member,)
    assert len(states) == tree.num_roots
    cost = tree.cost()
    assert (cost.rollout, cost.train, cost.edges, cost.leaves) == (len(evaluated), len(trained), group * size, group)
    seen = []
    noise = KeyedNoise(0, 0, [0], (2,))
    rollout(lambda x, s, r: seen.append(len(x)) or x, noise.start(tree), diffusers_sigmas(steps), tree, CPS(), noise.step,
            micro_batch=5)  # fmt: skip
    assert sum(seen) == cost.rollout and max(seen) <= 5


def test_flow_grpo_fast_rows() -> None:
    assert window(10, 24, 4, 2).cost().rollout == 125 and window(10, 24, 4, 2).cost().train == 25
    assert window(10, 24, 4, 2, shared_start=False).cost().rollout == 240
    assert chain(10, 24).cost().train == 24 * 9


def test_noise_is_a_function_of_its_key() -> None:
    assert torch.equal(normal((4,), 7, "step", 1), normal((4,), 7, "step", 1))
    assert not torch.equal(normal((4,), 7, "step", 1), normal((4,), 7 + 2**32, "step", 1))  # low 32 bits alike
    assert not torch.equal(normal((4,), 12, "step"), normal((4,), 1, "2step"))
    twice = KeyedNoise(0, 0, [3, 3], (4,))
    tree = Tree.cat([window(4, 2, 1, 1)] * 2)
    assert not torch.equal(*twice.start(tree))  # a prompt seen again
    assert not torch.equal(twice.start(tree), KeyedNoise(0, 1, [3, 3], (4,)).start(tree))


def test_samples_do_not_depend_on_the_batch() -> None:
    velocity, _ = gaussian_velocity()
    trees = [window(6, 3, 2, 2), chain(6, 2), window(6, 2, 0, 1)]

    def leaves(which: list[int]) -> dict[int, torch.Tensor]:
        tree = Tree.cat([trees[i] for i in which])
        noise = KeyedNoise(0, 0, which, (5,))
        forest = rollout(velocity, noise.start(tree), diffusers_sigmas(6), tree, FlowSDE(), noise.step, micro_batch=2)
        return {i: forest.at(tree.leaves[tree.group[tree.leaves] == n]) for n, i in enumerate(which)}

    together, reordered, alone = leaves([0, 1, 2]), leaves([2, 0, 1]), leaves([1])
    for group in range(3):
        torch.testing.assert_close(together[group], reordered[group], rtol=0, atol=1e-6)
    torch.testing.assert_close(together[1], alone[1], rtol=0, atol=1e-6)


def test_a_tree_may_probe_any_state_and_share_its_velocity() -> None:
    """State 1 has a stochastic child and a deterministic probe that jumps the grid: one velocity serves both."""
    tree = Tree.from_parents([-1, 0, 1, 1, 2], [0, 1, 2, 3, 3], [0, 1, 1, 0, 0], 3)
    assert tree.cost().rollout == 3 and len(tree.leaves) == 2
    noise = KeyedNoise(0, 0, [0], (2,))
    forest = rollout(lambda x, s, r: 0.5 * x, noise.start(tree), diffusers_sigmas(3), tree, FlowSDE(), noise.step)
    state = int((tree.index == 1).nonzero())
    probe = next(n for n in tree.leaves.tolist() if int(tree.parent[n]) == state)
    x = forest.at(torch.tensor([state]))
    expected = x + (0 - diffusers_sigmas(3)[1]) * 0.5 * x
    torch.testing.assert_close(forest.at(torch.tensor([probe])), expected)


# ---------------------------------------------------------------------------------------------- plans


def test_window_schedules() -> None:
    rng = generator(0, "select")
    slide = Sliding(every=25, stride=1)
    assert [slide.start(m, 0, 25, 4, rng) for m in (0, 24, 25, 299)] == [0, 0, 1, 11]
    assert Sliding(every=1).start(10_000, 0, 25, 4, rng) == 21
    assert Sliding(every=2, roll_back=True).start(6, 0, 6, 4, rng) == 0
    starts = {Random().start(m, 2, 7, 2, rng) for m in range(200)}
    assert starts == {2, 3, 4, 5}
    for iteration in range(60):
        plan = Window(size=4, low=0, high=None, position=Sliding(every=1))
        assert len(plan.tree(25, 2, iteration, rng).edges) == 8  # never shorter than the window


@pytest.mark.parametrize(
    "make",
    [
        lambda: window(4, 2, 3, 2),
        lambda: window(4, 1, 0, 1),
        lambda: Window(size=3, low=2).forecast(4, 2),
        lambda: Window(position=Fixed(9)).tree(4, 2, 0, generator(0)),
        lambda: Chain().forecast(0, 2),
        lambda: FlowSDE()(X, V, 0.5, 0.7),
        lambda: FlowSDE(-1.0),
        lambda: FlowSDE()(X, V, 0.7, 0.5, TransitionContext(level=0.0)).log_prob(X),
        lambda: rollout(lambda x, s, r: x, torch.zeros(2, 2), diffusers_sigmas(3), chain(4, 2), CPS(), lambda t, n: n),
    ],
)
def test_bad_input_says_what_was_expected(make) -> None:
    with pytest.raises(ValueError, match=r"expected|density"):
        make()


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_merged_siblings_give_the_per_edge_gradient_in_fp64(kernel) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def velocity(x: torch.Tensor, sigma: torch.Tensor, root: torch.Tensor | None = None) -> torch.Tensor:
        return net(torch.cat([x.double(), sigma.double()[:, None]], 1))

    tree, grid = window(6, 5, 1, 2), diffusers_sigmas(6)
    noise = KeyedNoise(0, 0, [0], (2,))
    forest = rollout(velocity, noise.start(tree).double(), grid, tree, kernel, noise.step, store_dtype=F64)
    weight = torch.linspace(-1, 1, len(tree.edges), dtype=F64)

    def gradient(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        net.zero_grad()
        for edges in parts:
            parents, position = tree.distinct_parents(edges)
            step = forest.edge_steps(edges, velocity(forest.at(parents), forest.sigma(parents)), position)
            ratio = (step.log_prob(forest.at(edges)) - forest.log_prob[edges]).exp()
            (ratio * weight[torch.isin(tree.edges, edges)]).sum().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    merged, single = gradient([tree.edges]), gradient(list(tree.edges.split(1)))
    assert len(tree.distinct_parents(tree.edges)[0]) == 6 and len(tree.edges) == 10
    for one, other in zip(merged, single, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
