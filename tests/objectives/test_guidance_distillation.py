"""Guidance distilled into the velocity: the student repeats the guided moments without a reward; the tilt of a marginal."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowalign.objectives import GuidanceDistillation
from flowalign.rollouts.guidance import RewardGuidance
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import (
    DanceSDE,
    FlowSDE,
    Forest,
    Guided,
    Kernel,
    KeyedNoise,
    RewardGradient,
    Tree,
    chain,
    plain_sigmas,
    rollout,
    window,
)
from samplers.kernels.guided import GRADIENTS, RATE
from tests.helpers.kernels import F64, FLOW, VP, bed, moments
from tests.helpers.trees import split_tree

M, DELTA = 0.5, 0.8


@dataclass(frozen=True)
class Quadratic:
    """ρ = w·x − ½κ·x², summed over elements: as the samplers ask for a reward, and as a reward."""

    w: float = 0.7
    kappa: float = 0.0
    name: str = "quadratic"
    spec = RewardSpec(("latents",), "latent", differentiable=True)

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return (self.w * x - 0.5 * self.kappa * x.square()).sum(1)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        scores = self.score(batch.latents, batch.sigma, batch.sigma)
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


def rolled(guidance: RewardGuidance, reward: Quadratic, tree: Tree, kernel: Kernel, steps: int = 6) -> Forest:
    """A guided forest of Gaussian data in float64, with the velocities "old", as `collect` leaves it."""
    noise, grid = KeyedNoise(0, 0, [0], (2,)), plain_sigmas(steps).double()
    velocity, _ = bed(FLOW, M, DELTA)

    def batch(groups: Tensor, latents: Tensor, sigma: Tensor) -> RewardBatch:
        return RewardBatch(prompts=["x"] * len(latents), latents=latents, sigma=sigma.to(latents))

    one = guidance.begin(kernel, FLOW, reward, batch, tree.group[: tree.num_roots], lambda nodes, count: nodes, 4)
    start = noise.start(tree).double()
    forest = rollout(velocity, start, grid, tree, one.kernel, noise.step, store_dtype=F64, keep_velocities=True)
    return guidance.replayed(one.recorded(tree, forest), kernel, FLOW)


@pytest.mark.parametrize("mode", ["unguided", "guided"])
@pytest.mark.parametrize("options", [{"scale": 0.3}, {"form": "doob", "beta": 0.5}, {"scale": 0.2, "normalize": True}])
def test_under_the_target_the_kernels_own_mean_is_the_guided_one(options, mode) -> None:
    """At every trained state, also where siblings leave it; nodes outside start..end have no target."""
    guidance = RewardGuidance(**options, start=1, end=4, log_prob_mean=mode)
    reward, kernel, tree = Quadratic(kappa=1.3), DanceSDE(0.4), split_tree(6, (1, 3))
    forest = rolled(guidance, reward, tree, kernel)
    found = GuidanceDistillation().targets(forest, torch.empty(0), torch.empty(0))
    inside = tree.parents_of_edges[(tree.index[tree.parents_of_edges] >= 1) & (tree.index[tree.parents_of_edges] <= 4)]
    assert torch.equal(found.nodes, inside) and bool((found.weight == 1).all())
    edges = tree.edges[torch.isin(tree.parent[tree.edges], inside)]
    x, (sigma, then) = forest.at(tree.parent[edges]), forest.step_sigmas(edges)
    target = found.velocity.at(torch.searchsorted(inside, tree.parent[edges]))
    gradient = 0.7 - 1.3 * x
    if guidance.normalize:
        gradient = gradient / gradient.norm(dim=1, keepdim=True)
    h, s = (sigma - then)[:, None], kernel.coefficients(sigma, then).std[:, None]
    rate = s**2 / 0.5 if guidance.scale is None else guidance.scale * h
    old = forest.velocities["old"].at(tree.parent[edges])
    expected = kernel(x, old, sigma, then).mean + rate * gradient
    torch.testing.assert_close(kernel(x, target, sigma, then).mean, expected, rtol=0, atol=1e-14)


@dataclass(frozen=True)
class Student:
    """The bed's velocity plus (λ/b)·∇ρ as an affine function of x at each level, which is what regression ends at."""

    slope: dict[float, tuple[float, float]]

    def __call__(self, x: Tensor, sigma: Tensor, root: Tensor | None = None) -> Tensor:
        constant, slope = self.slope.get(round(float(sigma), 12), (0.0, 0.0))
        return bed(FLOW, M, DELTA)[0](x, sigma) + constant + slope * x


@pytest.mark.parametrize(
    ("kernel", "g"), [(DanceSDE(0.25), 0.25), (FlowSDE(0.7, sigma_cap=0.95), None)], ids=["dance", "flow"]
)
@pytest.mark.parametrize("kappa", [0.0, 1.3], ids=["linear", "quadratic"])
def test_the_student_repeats_the_guided_moments_without_the_reward(kernel: Kernel, g, kappa: float) -> None:
    """Regression on the targets (least squares on visited states) gives an affine student; its own rollout has the
    mean and variance of the guided one at every step, to machine precision. Of a linear ρ each constant is
    −λ̃·w/(1 + g²(1−σ)/2σ)."""
    reward, guidance, steps = Quadratic(kappa=kappa), RewardGuidance(scale=0.4), 6
    forest = rolled(guidance, reward, chain(steps, 8), kernel)
    targets = GuidanceDistillation().targets(forest, torch.empty(0), torch.empty(0))
    learned = {}
    sigmas, x = forest.sigma(targets.nodes), forest.at(targets.nodes).flatten(1)
    extra = targets.velocity.values - forest.velocities["old"].at(targets.nodes)
    for sigma in sigmas.unique().tolist():
        here = sigmas == sigma
        design = torch.stack([torch.ones_like(x[here].flatten()), x[here].flatten()], 1)
        constant, slope = torch.linalg.lstsq(design, extra[here].flatten()[:, None]).solution.flatten().tolist()
        learned[round(sigma, 12)] = (constant, slope)
        if g is not None and not kappa:
            assert constant == pytest.approx(-0.4 * 0.7 / (1 + g**2 * (1 - sigma) / (2 * sigma)), abs=1e-13)
            assert slope == pytest.approx(0, abs=1e-13)
    velocity, grid = bed(FLOW, M, DELTA)[0], forest.sigmas.tolist()
    ascent = Guided(kernel, RewardGradient(reward), scale=0.4)
    teacher, student, plain = (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)
    for sigma, then in itertools.pairwise(grid[:-1]):  # the last step has no noise: no state of it is trained
        teacher = moments(ascent, velocity, *teacher, sigma, then)
        student = moments(kernel, Student(learned), *student, sigma, then)
        plain = moments(kernel, velocity, *plain, sigma, then)
        assert student == pytest.approx(teacher, abs=1e-13)
    assert abs(teacher[0] - plain[0]) > 0.05


def test_the_marginal_target_is_the_velocity_of_the_tilted_marginal() -> None:
    """ρ = w·x: the score is w/β larger; the law at σ is moved by V(σ)·w/β."""
    forest = rolled(RewardGuidance(scale=0.1), Quadratic(), window(6, 4, 2, 2), DanceSDE(0.3))
    found = GuidanceDistillation("marginal", beta=0.9).targets(forest, torch.empty(0), torch.empty(0))
    x, sigma = forest.at(found.nodes), forest.sigma(found.nodes)
    velocity, marginal = bed(FLOW, M, DELTA)
    score = FLOW.score_from_velocity(x, velocity(x, sigma), sigma) + 0.7 / 0.9
    torch.testing.assert_close(found.velocity.values, FLOW.velocity_from_score(x, score, sigma))
    variance = torch.tensor([marginal(float(level)) for level in sigma], dtype=F64)[:, None]
    mean = (1 - sigma[:, None]) * M + variance * 0.7 / 0.9
    torch.testing.assert_close(score, -(x - mean) / variance)


def test_the_marginal_target_is_held_near_pure_noise() -> None:
    forest = rolled(RewardGuidance(scale=0.1), Quadratic(), chain(6, 2), DanceSDE(0.3))
    found = GuidanceDistillation("marginal", beta=1.0, max_odds=2.0).targets(forest, torch.empty(0), torch.empty(0))
    moved = found.velocity.values - forest.velocities["old"].at(found.nodes)
    sigma = forest.sigma(found.nodes)[:, None].expand_as(moved)
    assert bool((sigma == 1).any())
    torch.testing.assert_close(moved, -0.7 * (sigma / (1 - sigma)).clamp(max=2.0))


def test_siblings_at_different_noise_levels_share_the_mean_rate() -> None:
    tree = split_tree(3, (1,))
    tree = replace(tree, level=torch.where(tree.local % 2 == 1, 0.5 * tree.level, tree.level))
    forest = rolled(RewardGuidance(beta=0.5), Quadratic(), tree, DanceSDE(0.6), steps=3)
    node = int(tree.parent[tree.index == 2][0])
    edges = tree.edges[tree.parent[tree.edges] == node]
    assert len(edges) == 2 and tree.level[edges].unique().numel() == 2
    kernel = DanceSDE(0.6).coefficients(*forest.step_sigmas(edges), tree.level[edges])
    assert float(forest.scores[RATE][node]) == pytest.approx(float((kernel.std**2 / kernel.velocity_coef).mean()))


def test_what_it_needs_and_refuses() -> None:
    part = GuidanceDistillation(scale=0.5, fade=4)
    assert [part.scale_at(i) for i in (0, 1, 4, 9)] == [0.5, 0.375, 0.0, 0.0]
    assert part.needs_old and part.needs_guidance
    forest = rolled(RewardGuidance(scale=0.1), Quadratic(), chain(3, 2), DanceSDE(0.3), steps=3)
    for role in ("old", GRADIENTS):
        without = replace(forest, velocities={k: v for k, v in forest.velocities.items() if k != role})
        with pytest.raises(ValueError, match=r"set rollout\.reward_guidance"):
            part.targets(without, torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match="take sde_mean"):
        GuidanceDistillation("marginal").check(VP, ("ocr",))
    GuidanceDistillation().check(VP, ("ocr",))
    for bad in ({"target": "mean"}, {"scale": -1.0}, {"fade": 0}, {"beta": 0.0}, {"max_odds": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            GuidanceDistillation(**bad)
