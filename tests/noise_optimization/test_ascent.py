"""ReNO against closed forms: its regularizer, a linear generator, its counts; and SPSA, which estimates the same gradient."""

import math

import pytest
import torch

import flowalign as fa
from flowalign.noise_optimization import SPSA, Ascent, Gradient, optimize_noise
from flowalign.noise_optimization.ascent import norm_penalty
from rewards import RewardError
from tests.helpers.linear_policy import LinearPolicy, Nearness

D = 12
PLAIN = Ascent(learning_rate=0.2, momentum=0.5, clip=1e9, norm_weight=0.0)


def matrix(seed: int = 0) -> torch.Tensor:
    """Well conditioned: singular values between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(D, D, generator=generator)).Q for _ in range(2))
    return left @ torch.diag(torch.linspace(0.5, 1.5, D)) @ right


def target(seed: int = 1) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed)) * 2


# ------------------------------------------------------------------------------------------ the regularizer


def test_penalty_is_minus_the_log_density_of_the_chi_law():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    chi = torch.distributions.Chi2(torch.tensor(12.0, dtype=torch.float64))
    norm = z.flatten(1).norm(dim=1)
    log_density = chi.log_prob(norm.square()) + (2 * norm).log()  # of the norm, from that of its square
    gap = norm_penalty(z) + log_density
    torch.testing.assert_close(gap, gap[:1].expand(5), rtol=0, atol=1e-10)  # equal up to a constant


def test_gradient_of_the_penalty_is_z_times_1_minus_d_minus_1_over_the_square_of_the_norm():
    z = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm_penalty, z)
    (gradient,) = torch.autograd.grad(norm_penalty(z).sum(), z)
    expected = z * (1 - (D - 1) / z.square().sum(1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_descent_of_the_penalty_keeps_the_direction_and_ends_on_the_sphere():
    z = 7 * torch.randn(3, D, dtype=torch.float64)
    first = z / z.norm(dim=1, keepdim=True)
    for _ in range(2000):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(norm_penalty(z).sum(), z)
        z = (z - 0.05 * gradient).detach()
    torch.testing.assert_close(z / z.norm(dim=1, keepdim=True), first)
    torch.testing.assert_close(z.norm(dim=1), torch.full((3,), math.sqrt(D - 1), dtype=torch.float64))
    least = 0.5 * (D - 1) * (1 - math.log(D - 1))
    torch.testing.assert_close(norm_penalty(z), torch.full((3,), least, dtype=torch.float64))


def test_penalty_of_half_precision_is_computed_in_fp32():
    z = torch.randn(2, 4096)
    assert norm_penalty(z.half()).dtype == torch.float32
    torch.testing.assert_close(norm_penalty(z.half()), norm_penalty(z.half().float()), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ a linear generator


def test_gradient_through_a_linear_generator_is_the_closed_form():
    """One plain step from z: z + lr·Wᵀ(y − Wz)."""
    weight, y = matrix(), target()
    ascent = Ascent(learning_rate=0.3, momentum=0.0, clip=1e9, norm_weight=0.0)
    found = optimize_noise(LinearPolicy(weight), "a", Nearness(y), steps=2, method=Gradient(ascent), progress=False)
    z = found.start.flatten()
    torch.testing.assert_close(found.noise.flatten(), z + 0.3 * weight.T @ (y - weight @ z))


def test_without_the_penalty_it_converges_to_the_least_squares_solution():
    weight, y = matrix(), target()
    found = optimize_noise(LinearPolicy(weight), "a", Nearness(y), steps=400, method=Gradient(PLAIN), progress=False)
    torch.testing.assert_close(found.noise.flatten(), torch.linalg.solve(weight, y), rtol=1e-3, atol=1e-3)
    assert float(found.total) > -1e-5 > float(found.first_total)


@pytest.mark.parametrize("norm_weight", [0.1, 1.0])
def test_with_the_penalty_the_optimum_is_parallel_to_the_target_and_of_known_length(norm_weight):
    """W = I: z = α·y/‖y‖ with (1+λ)α² − ‖y‖α − λ(d−1) = 0. The best by the reward alone is another one, so the last is read."""
    y, norm = target(), float(target().norm())
    ascent = Ascent(learning_rate=0.1, momentum=0.5, clip=1e9, norm_weight=norm_weight)
    found = optimize_noise(
        LinearPolicy(torch.eye(D)), "a", Nearness(y), steps=500, method=Gradient(ascent), progress=False
    )
    alpha = (norm + math.sqrt(norm**2 + 4 * (1 + norm_weight) * norm_weight * (D - 1))) / (2 * (1 + norm_weight))
    assert float(found.history["norm"][-1, 0]) == pytest.approx(alpha, rel=1e-4)
    assert float(found.history["total"][-1, 0]) == pytest.approx(-0.5 * (norm - alpha) ** 2, rel=1e-3, abs=1e-4)


def test_a_clipped_step_is_at_most_lr_clip_long_and_momentum_adds_up():
    """Nesterov's first step is lr·(g + μg), g the clipped gradient."""
    ascent = Ascent(learning_rate=5.0, momentum=0.9, clip=0.1, norm_weight=0.0)
    found = optimize_noise(
        LinearPolicy(torch.eye(D)), "a", Nearness(100 * target()), steps=2, method=Gradient(ascent), progress=False
    )
    assert float((found.noise - found.start).norm()) == pytest.approx(5.0 * 0.1 * 1.9, rel=1e-4)


# ------------------------------------------------------------------------------------------ the loop


def test_fifty_iterations_are_fifty_forwards_and_49_updates():
    policy, reward = LinearPolicy(matrix()), Nearness(target())
    found = optimize_noise(policy, ["a", "b"], reward, steps=50, method=Gradient(PLAIN), progress=False)
    assert policy.evaluations == found.evaluations == found.decoded == 100  # 2 prompts
    assert sum(reward.asked) == 100 and policy.encoded == 2
    changes = found.history["norm"].diff(dim=0).abs() > 0
    assert found.history["norm"].shape == (50, 2) and int(changes[:5].sum()) == 10


def test_best_is_the_argmax_of_the_iterations_and_never_worse_than_the_start():
    """A learning rate that overshoots: totals rise and fall."""
    ascent = Ascent(learning_rate=30.0, clip=0.1)
    found = optimize_noise(
        LinearPolicy(matrix()), [f"{i}" for i in range(6)], Nearness(target()), steps=12, method=Gradient(ascent),
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found.total, found.history["total"].max(0).values)
    assert torch.equal(found.best_step, found.history["total"].argmax(0))
    assert torch.equal(found.first_total, found.history["total"][0]) and bool((found.total >= found.first_total).all())
    weight = matrix()
    again = -0.5 * ((found.noise.flatten(1) @ weight.T) - target()).square().sum(1)
    torch.testing.assert_close(again, found.total)  # of the noise that is returned


def test_result_does_not_depend_on_the_other_prompts_nor_on_the_batch():
    def run(prompts, batch_size):
        return optimize_noise(
            LinearPolicy(matrix()), prompts, Nearness(target()), steps=7, batch_size=batch_size, seed=3, progress=False
        )

    records = [fa.as_records(["a", "b", "c"])[i] for i in (0, 1, 2)]
    together, split, alone = run(records, 3), run(records, 1), run(records[1:2], 3)
    torch.testing.assert_close(together.noise, split.noise)
    torch.testing.assert_close(together.noise[1:2], alone.noise)
    assert torch.equal(run(records, 3).noise, together.noise)  # bit for bit


def test_patience_stops_a_prompt_by_itself():
    """The first prompt starts at its optimum and never gains; the second gains in every iteration."""
    weight, y = torch.eye(D), target()
    start = torch.stack([y, torch.zeros(D) + 0.1]).view(2, 1, 1, D)
    policy = LinearPolicy(weight)
    found = optimize_noise(
        policy, ["at the optimum", "far away"], Nearness(y), steps=30, start=start, patience=4,
        method=Gradient(Ascent(0.05, 0.0, 1e9, 0.0)), progress=False,
    )  # fmt: skip
    tried = found.history["total"].isfinite().sum(0)
    assert tried.tolist() == [5, 30] and policy.evaluations == 35
    assert found.best_step.tolist() == [0, 29]
    assert list(found.strip) == [3, 8, 12, 16, 20, 25, 29]


def test_min_gain_counts_gains_from_the_last_that_counted():
    """Gains of 1 % each are below min_gain one by one, and above it together."""
    y = torch.zeros(D)
    start = torch.ones(1, 1, 1, D)
    shrink = Gradient(Ascent(0.01, 0.0, 1e9, 0.0))  # totals −6·0.99^2i
    kept = optimize_noise(
        LinearPolicy(torch.eye(D)), "a", Nearness(y), steps=40, start=start, patience=5, min_gain=0.3, method=shrink,
        progress=False,
    )  # fmt: skip
    stopped = optimize_noise(
        LinearPolicy(torch.eye(D)), "a", Nearness(y), steps=40, start=start, patience=2, min_gain=0.3, method=shrink,
        progress=False,
    )  # fmt: skip
    assert int(kept.history["total"].isfinite().sum()) > 5
    assert int(stopped.history["total"].isfinite().sum()) == 3


def test_a_prompt_without_a_valid_score_keeps_its_start_and_does_not_take_the_others_with_it():
    policy, reward = LinearPolicy(matrix()), Nearness(target(), unscorable="bad")
    found = optimize_noise(policy, ["good", "bad"], reward, steps=5, method=Gradient(PLAIN), progress=False)
    assert torch.equal(found.noise[1], found.start[1]) and found.total.isnan().tolist() == [False, True]
    alone = optimize_noise(policy, "good", reward, steps=5, method=Gradient(PLAIN), progress=False)
    torch.testing.assert_close(found.noise[:1], alone.noise)
    with pytest.raises(RewardError, match="none of 1 prompts got a valid score in 3 iterations"):
        optimize_noise(policy, "bad", reward, steps=3, progress=False)


# ------------------------------------------------------------------------------------------ SPSA


def test_spsa_estimates_the_gradient_in_the_mean():
    """Of a quadratic the two-sided difference is exact, so the mean over directions Δ of ΔΔᵀg is g."""
    weight, y, count = matrix(), target(), 6000
    method = SPSA(Ascent(1.0, 0.0, 1e9, 0.0), directions=count, scale=0.5)
    found = optimize_noise(
        LinearPolicy(weight),
        "a",
        Nearness(y, differentiable=False),
        steps=1,
        method=method,
        progress=False,
        batch_size=5000,
    )
    walk = method.begin(*_objective(LinearPolicy(weight), Nearness(y, differentiable=False), found.start))
    walk.step(torch.arange(1))
    estimate, z = walk.pending[1].flatten(), found.start.flatten()
    exact = weight.T @ (y - weight @ z)
    assert float((estimate - exact).norm() / exact.norm()) < 4 * math.sqrt(D / count)
    assert found.evaluations == 1 + 2 * count


def _objective(policy, reward, start):
    from flowalign.noise_optimization.objective import Objective

    records = fa.as_records("a")
    return Objective(policy, records, policy.encode(records), policy.sampling, [(reward, 1.0)], 0, 4096), start


def test_spsa_raises_a_reward_without_gradient():
    found = optimize_noise(
        LinearPolicy(matrix()), ["a", "b"], Nearness(target(), differentiable=False), steps=60,
        method=SPSA(Ascent(0.2, 0.5, 1.0, 0.0), directions=4, scale=0.1), progress=False,
    )  # fmt: skip
    assert bool((found.total > 0.2 * found.first_total).all())  # of negative numbers: a fifth of the distance
