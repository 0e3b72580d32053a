"""Trust regions against their formulas, finite differences and identities."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowalign.advantage import Advantages
from flowalign.objectives import (
    ClippedRatio,
    DynamicClip,
    FlatGradient,
    Guard,
    InverseLength,
    KLMask,
    LongCat,
    StdOverMean,
    Transitions,
)
from samplers import CPS, DanceSDE, FlowSDE, Tree, window
from tests.helpers.trees import everywhere, grown, split_tree

F64 = torch.float64
KERNELS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7, constants="full"), FlowSDE(0.7, reduce="sum")]
IDS = ["flow", "dance", "cps", "sum"]


class Toy:
    """Two transitions of one kernel with five elements."""

    def __init__(self, kernel) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernel = kernel
        self.x, self.v, self.noise, self.shift = (torch.randn(2, 5, generator=generator, dtype=F64) for _ in range(4))
        self.old = kernel(self.x, self.v, 0.7, 0.55)
        self.arrived = self.old.sample(self.noise)
        self.advantages = torch.tensor([[1.3, -0.2], [-0.4, 0.9]], dtype=F64)

    def transitions(self, v: torch.Tensor, bounds=None) -> tuple[torch.Tensor, torch.Tensor, Transitions]:
        step = self.kernel(self.x, v, 0.7, 0.55)
        return (
            step.log_prob(self.arrived),
            self.old.log_prob(self.arrived),
            Transitions(step, self.arrived, self.old, bounds),
        )

    def loss(self, objective, v: torch.Tensor, bounds=None) -> torch.Tensor:
        log_prob, old, transitions = self.transitions(v, bounds)
        return objective.loss(log_prob, old, self.advantages, transitions)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_the_guarded_ratio_is_the_ratio_without_its_bias(kernel) -> None:
    """ln r̂ = s·[ln r + ⟨Δμ²⟩/(2s²)] = ⟨z·Δμ⟩; for a constant δv it is b·δv·⟨z⟩ exactly."""
    toy = Toy(kernel)
    log_prob, old, transitions = toy.transitions(toy.v + 0.1 * toy.shift)
    got = Guard().log_ratio(log_prob, old, transitions)
    s = toy.old.std
    torch.testing.assert_close(got, s * (log_prob - old + transitions.step.kl(toy.old, form="exact")))
    log_prob, old, transitions = toy.transitions(toy.v + 0.03)
    reduced = toy.noise.mean(1) if kernel.reduce == "mean" else toy.noise.sum(1)
    torch.testing.assert_close(
        Guard().log_ratio(log_prob, old, transitions), toy.old.policy.velocity_coef * 0.03 * reduced
    )
    log_prob, old, transitions = toy.transitions(toy.v)
    assert not bool(Guard().log_ratio(log_prob, old, transitions).any())


def test_the_guarded_ratio_has_no_bias_over_noise_and_the_plain_one_has() -> None:
    toy, shift = Toy(FlowSDE(0.7)), 0.2
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    noise = torch.cat([noise, -noise])
    x, v = torch.full_like(noise, 0.3), torch.full_like(noise, -1.1)
    old, new = toy.kernel(x, v, 0.7, 0.55), toy.kernel(x, v + shift, 0.7, 0.55)
    arrived = old.sample(noise)
    log_prob, log_old = new.log_prob(arrived), old.log_prob(arrived)
    assert float(Guard().log_ratio(log_prob, log_old, Transitions(new, arrived, old)).mean()) == pytest.approx(
        0, abs=1e-12
    )
    b, s = float(old.policy.velocity_coef[0]), float(old.std[0])
    assert float((log_prob - log_old).mean()) == pytest.approx(-(b**2) * shift**2 / (2 * s**2), rel=1e-9)


@pytest.mark.parametrize("weight", ["none", "inv_h", "beta_over_h", "inv_b"])
def test_guard_weights_set_the_gradient_scale(weight: str) -> None:
    """At ratio 1 the gradient of one edge is A·δ·b·z/D: |b|·δ is 1+a²/2 (inv_h, Flow), β² (beta_over_h, Dance), 1 (inv_b)."""
    for kernel in (FlowSDE(0.7), DanceSDE(0.3)):
        toy = Toy(kernel)
        v = toy.v.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(toy.loss(Guard(weight=weight), v).sum(), v)
        b, h = toy.old.policy.velocity_coef.abs(), toy.old.policy.step_size
        beta = {FlowSDE: 1 + 0.7**2 / 2, DanceSDE: 1 + 0.3**2 * 0.3 / (2 * 0.7)}[type(kernel)]
        np.testing.assert_allclose(b / h, beta)
        scale = {"none": beta * h, "inv_h": beta, "beta_over_h": beta**2, "inv_b": 1.0}[weight]
        summed = toy.advantages.sum(1, keepdim=True)
        torch.testing.assert_close(gradient, summed * torch.as_tensor(scale).reshape(-1, 1) * toy.noise / 5)


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
@pytest.mark.parametrize(
    "objective",
    [ClippedRatio(10.0), ClippedRatio((0.02, 5.0)), Guard(10.0), Guard(10.0, "inv_b"), KLMask(1e-9)],
    ids=str,
)
def test_every_loss_term_against_finite_differences(objective, kernel) -> None:
    toy = Toy(kernel)
    v = (toy.v + 0.05 * toy.shift).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: toy.loss(objective, v), v)
    assert float(torch.autograd.grad(toy.loss(objective, v).sum(), v)[0].abs().sum()) > 0


def test_guard_without_weight_moves_like_the_clipped_ratio_times_s() -> None:
    toy = Toy(FlowSDE())
    v = toy.v.clone().requires_grad_()
    (guard,) = torch.autograd.grad(toy.loss(Guard(weight="none"), v).sum(), v)
    (plain,) = torch.autograd.grad(toy.loss(ClippedRatio(), v).sum(), v)
    torch.testing.assert_close(guard, toy.old.std[:, None] * plain)


def test_bounds_of_an_edge_and_channel_take_the_place_of_the_clip_range() -> None:
    log_prob = torch.tensor([0.3, 0.3, -0.3], dtype=F64)
    advantages = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.0]], dtype=F64)
    bounds = torch.tensor([[[0.1, 0.1], [0.1, 9.0]], [[0.1, 0.2], [0.1, 0.3]], [[0.05, 0.1], [0.1, 0.1]]], dtype=F64)
    transitions = Transitions(
        FlowSDE()(torch.zeros(3, 1), torch.zeros(3, 1), 0.7, 0.5), torch.zeros(3, 1), None, bounds
    )
    up, down = float(np.exp(0.3)), 0.95
    got = ClippedRatio(1e-4).loss(log_prob, torch.zeros(3, dtype=F64), advantages, transitions)
    np.testing.assert_allclose(got, [-1.1 - 2 * up, -1.2 - 2 * 1.3, down])
    outside = ClippedRatio(1e-4).clipped(log_prob, torch.zeros(3, dtype=F64), advantages, transitions)
    assert outside.tolist() == [True, True, True]
    wide = replace(transitions, bounds=bounds + 1.0)
    assert not bool(ClippedRatio(1e-4).clipped(log_prob, torch.zeros(3, dtype=F64), advantages, wide).any())


def test_several_channels_are_clipped_one_by_one() -> None:
    """Loss sum is not advantage sum: at r = 1.2, ε = .1, advantages +1 and −1 do not cancel."""
    log_prob = torch.tensor([1.2], dtype=F64).log()
    loss = ClippedRatio(0.1).loss(log_prob, torch.zeros(1, dtype=F64), torch.tensor([[1.0, -1.0]], dtype=F64))
    assert float(loss) == pytest.approx(-1.1 + 1.2)


def test_below_and_above_have_bounds_of_their_own() -> None:
    log_prob = torch.tensor([0.85, 0.95, 1.15, 1.35], dtype=F64).log()
    advantages = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=F64)
    asymmetric = ClippedRatio((0.1, 0.3))
    assert asymmetric.clipped(log_prob, torch.zeros(4, dtype=F64), advantages, None).tolist() == [
        True,
        False,
        False,
        True,
    ]
    loss = asymmetric.loss(log_prob, torch.zeros(4, dtype=F64), advantages, None)
    torch.testing.assert_close(loss, torch.tensor([0.9, 0.95, -1.15, -1.3], dtype=F64))


def test_a_clip_range_of_2e_6_is_kept_in_fp32() -> None:
    """exp of fp32 log ratios is a multiple of 1.2e-7 near 1; the clip must not be."""
    for log_ratio, advantage, moves in (
        (2.02e-6, 1, False),
        (1.98e-6, 1, True),
        (-2.02e-6, -1, False),
        (-1.98e-6, -1, True),
    ):
        log_prob = torch.tensor([log_ratio], requires_grad=True)
        ClippedRatio(2e-6).loss(log_prob, torch.zeros(1), torch.tensor([[float(advantage)]])).sum().backward()
        assert log_prob.grad is not None and float(log_prob.grad) == pytest.approx(-advantage if moves else 0, rel=1e-5)


def test_the_mask_stops_what_is_far_and_moves_away() -> None:
    toy = Toy(FlowSDE())
    log_prob, old, transitions = toy.transitions(toy.v + 0.3 * toy.shift)
    kl, ratio = transitions.step.kl(toy.old, form="exact"), (log_prob - old).exp()
    for sign in (1.0, -1.0):
        advantages = sign * torch.ones(2, 1, dtype=F64)
        away = sign * (ratio - 1) > 0
        assert bool(away.any()) or sign < 0
        near = KLMask(float(kl.max()) * 1.01).loss(log_prob, old, advantages, transitions)
        torch.testing.assert_close(near, -sign * ratio)
        far = KLMask(float(kl.min()) * 0.99).loss(log_prob, old, advantages, transitions)
        torch.testing.assert_close(far, torch.where(away, 0.0, -sign * ratio))
        assert KLMask(float(kl.min()) * 0.99).clipped(log_prob, old, advantages, transitions).tolist() == away.tolist()
    with pytest.raises(ValueError, match="the step under the rollout's weights"):
        KLMask().loss(log_prob, old, advantages, Transitions(transitions.step, transitions.arrived))


@pytest.mark.parametrize(
    "kernel", [FlowSDE(0.7), CPS(0.7), CPS(0.7, constants="full"), FlowSDE(0.7, reduce="sum")], ids=str
)
def test_the_mask_lets_rounding_below_its_own_bound_pass_and_nothing_far_beyond(kernel) -> None:
    """Random errors of the means, as bf16 makes them, of KL max_kl/2 and 9·max_kl, in 64 steps of 4,096 elements."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise, error = (torch.randn(64, 4096, generator=generator, dtype=F64) for _ in range(4))
    max_kl = 1e-5 if kernel.reduce == "mean" else 1e-2
    old = kernel(x, v, 0.7, 0.55)
    arrived, objective = old.sample(noise), KLMask(max_kl)
    unit = kernel(x, v + error, 0.7, 0.55).kl(old, form="exact").sqrt()[:, None]
    largest = {}
    for share in (0.5, 9.0):
        new = kernel(x, v + error * (share * max_kl) ** 0.5 / unit, 0.7, 0.55)
        torch.testing.assert_close(new.kl(old, form="exact"), torch.full((64,), share * max_kl, dtype=F64))
        transitions = Transitions(new, arrived, old)
        drift = objective.log_ratio(new.log_prob(arrived), old.log_prob(arrived)).abs()
        limit = objective.drift_limit(transitions)
        assert limit.shape == (64,) and bool((drift > limit).any()) == (share > 1)
        largest[share] = float(drift.max())
    assert largest[0.5] > max_kl  # what would have been taken for a changed policy


def test_dynamic_bounds() -> None:
    forest = grown(Tree.cat([split_tree(3, (0,)), split_tree(3, (0,))]))
    values = torch.zeros(len(forest.tree.edges), 1)
    root = forest.tree.root[forest.tree.edges]
    values[root == 0, 0] = torch.tensor([2.0, -1.0, 2.0, -1.0, 0.0, -2.0])
    got = DynamicClip(5e-5, 2e-4, 4.0).bounds(forest, Advantages(values, everywhere(values), 0.0))
    assert got.shape == (12, 1, 2)
    relative = np.array([1.0, -0.5, 1.0, -0.5, 0.0, -1.0])
    expected = 5e-5 + 1.5e-4 / (1 + np.exp(-4 * relative))
    np.testing.assert_allclose(got[root == 0, 0, 1], expected, rtol=1e-12)
    np.testing.assert_allclose(got[root == 1, 0, 0], 5e-5 + 0.75e-4)  # nothing differs in the other tree
    small = torch.where(root[:, None] == 0, values, 0.01 * torch.ones_like(values))  # each tree has its own largest
    got = DynamicClip(5e-5, 2e-4, 4.0).bounds(forest, Advantages(small, everywhere(small), 0.0))
    np.testing.assert_allclose(got[root == 1, 0, 0], expected[0], rtol=1e-12)
    constant = DynamicClip(1e-4, 1e-4).bounds(forest, Advantages(values, everywhere(values), 0.0))
    np.testing.assert_allclose(constant, 1e-4)


def test_step_weights_on_the_sd3_grid() -> None:
    forest = grown(Tree.cat([window(10, 2, start, 1) for start in range(9)]), FlowSDE(0.7))
    edges = forest.tree.edges
    parents, position = forest.tree.distinct_parents(edges)
    step = forest.edge_steps(edges, torch.zeros(len(parents), 3), position)
    gradient = LongCat().weigh(step, forest, edges) * step.policy.velocity_coef.abs() / step.std
    order = forest.tree.index[forest.tree.parent[edges]]
    scale = step.policy.velocity_coef.abs() / step.std  # of a step's gradient without a weight: 26-fold over the grid
    golden = [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487]
    np.testing.assert_allclose([float(scale[order == i][0]) for i in range(9)], golden, atol=6e-4)
    sigma, sigma_next = forest.step_sigmas(edges)
    np.testing.assert_allclose(gradient[sigma < 1], (1 + 0.7**2 / 2) / 0.7, rtol=1e-5)
    np.testing.assert_allclose(gradient[sigma == 1], 1 / 0.7, rtol=1e-5)  # at σ = 1 the velocity_coef is −h alone
    assert float(StdOverMean().weigh(step, forest, edges).mean()) == pytest.approx(1, abs=1e-6)  # over the nine steps
    np.testing.assert_allclose(InverseLength().weigh(step, forest, edges), 1 / (sigma - sigma_next), rtol=1e-6)


@pytest.mark.parametrize(
    "kernel", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7), CPS(0.7, constants="full"), CPS(0.7, reduce="sum")], ids=str
)
def test_flat_gradients_are_flat(kernel) -> None:
    """The gradient itself, not s/|b|: a log-prob without constants moves 2s² times as much, a 12-fold spread with CPS."""
    forest = grown(Tree.cat([window(10, 2, start, 1) for start in range(9)]), kernel)
    edges = forest.tree.edges
    parents, position = forest.tree.distinct_parents(edges)
    velocity = -0.3 * forest.at(parents)[position]
    velocity.requires_grad_()
    step = forest.edge_steps(edges, velocity, torch.arange(len(edges)))
    (FlatGradient().weigh(step, forest, edges) * step.log_prob(forest.at(edges))).sum().backward()
    z = ((forest.at(edges) - step.mean) / step.std[:, None]).detach()
    assert velocity.grad is not None
    scale = velocity.grad * (3 if kernel.reduce == "mean" else 1) / z
    torch.testing.assert_close(scale, torch.full_like(scale, -1.0), rtol=1e-3, atol=0)


def test_flat_gradient_weight_of_a_step_without_noise_is_0() -> None:
    forest = grown(window(3, 2, 2, 1), CPS(0.7))
    step = forest.edge_steps(forest.tree.edges, torch.zeros(1, 3), torch.tensor([0, 0]))
    assert FlatGradient().weigh(step, forest, forest.tree.edges).tolist() == [0, 0]


def test_clip_ranges_must_be_positive() -> None:
    for objective in (lambda: Guard(0.0), lambda: ClippedRatio((1e-4, -1.0)), lambda: KLMask(0.0)):
        with pytest.raises(ValueError, match="above 0"):
            objective()
