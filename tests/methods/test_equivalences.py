"""Methods that are the same method under another name: equal samples and equal gradients, through the real trainer on the bed.

Gradients are compared bit for bit where both names make the same network calls, else to rounding."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Mixed, Normalized, PerChannel
from flowalign.credit import BranchLocal, Broadcast, Gain, Joined, Process, SubtreeFusion, TurningPoint
from flowalign.objectives import ClippedRatio, DynamicClip, Guard, LayerTuning, StdOverMean, Uniform
from flowalign.trainers import PolicyGradient, Signal
from samplers import (
    CPS,
    DDIM,
    ODE,
    Branch,
    Chain,
    DanceSDE,
    DPMSolver,
    Fixed,
    FlowSDE,
    Guided,
    Probed,
    RewardGradient,
    SplitTree,
    TransitionContext,
    TreeWindow,
    VariancePreserving,
    Window,
)
from tests.helpers.bed import Potential
from tests.helpers.bed_run import Bed

STEP = 3  # where methods with one stochastic step have it
STEPS = 10
GROUP = 6


def found(
    bed: Bed, plan, kernel=None, process=(), objective=None, step_weight=None, group_size: int = GROUP, parts=None, **signal
):  # fmt: skip
    """(network rows, scores of the leaves, gradient) of one iteration of a policy gradient of these parts."""
    trainer = PolicyGradient(
        Signal(**{"advantage": Normalized(), **signal}), objective or ClippedRatio(0.1), step_weight or Uniform(),
        micro_batch=4096, **(parts or {}),
    )  # fmt: skip
    rollout = replace(bed.task.rollout, plan=plan, kernel=kernel or FlowSDE(), group_size=group_size)
    task = replace(bed.task, rollout=rollout, process_rewards=process)
    trainer.prepare(task, None)
    before = bed.policy.evaluations
    batch, gradient = Bed(bed.config, bed.policy, task, trainer).gradient()
    assert float(gradient.norm()) > 1e-4
    return bed.policy.evaluations - before, batch.scores, gradient


def check_equal(one, other) -> None:
    """Bit for bit."""
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])


def test_a_window_of_all_steps_but_the_last_is_flow_grpo(bed: Bed) -> None:
    flow_grpo = found(bed, Chain())
    check_equal(flow_grpo, found(bed, Window(STEPS - 1, 0, STEPS - 1, shared_start=False)))
    assert not torch.equal(flow_grpo[2], found(bed, Window(STEPS - 2, 0, STEPS - 2, shared_start=False))[2])


ONE_STEP = {
    "Flow-GRPO-Fast": (Window(1, STEP, STEP + 1), Broadcast(), "prompt"),
    "BranchGRPO": (SplitTree((STEP,), GROUP, window=1, position=Fixed(STEP)), SubtreeFusion(), "tree_depth"),
    "TempFlow-GRPO": (Branch(GROUP, 1, (STEP,)), BranchLocal(), "seed_step"),
    "Dynamic-TreeRPO": (TreeWindow(1, GROUP, position=Fixed(STEP)), Broadcast(), "tree_depth"),
    "DenseGRPO": (Probed(Window(1, STEP, STEP + 1)), Gain(), "prompt_step"),
}


@pytest.mark.parametrize("method", list(ONE_STEP)[1:])
def test_with_one_step_that_splits_every_tree_is_flow_grpo_fast(bed: Bed, method: str) -> None:
    """The prefix is shared and deterministic, and so is all that follows. A gain is the reward less the same number for all
    siblings, the score of the deterministic completion, which costs an image and its network rows more."""
    (_, scores, gradient), (rows, own_scores, own) = (
        found(bed, plan, credit=credit, advantage=Normalized(within=within))
        for plan, credit, within in (ONE_STEP["Flow-GRPO-Fast"], ONE_STEP[method])
    )
    if method == "DenseGRPO":
        assert rows == 4 * (
            STEPS + GROUP * (STEPS - STEP - 1) + 1
        )  # the probe of the split; and the update's one state
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6)
        return
    assert rows == 4 * (STEP + 1 + GROUP * (STEPS - STEP - 1) + 1)
    assert torch.equal(own_scores, scores) and torch.equal(own, gradient)


def test_dynamic_tree_rpo_without_growth_bounds_and_tuning_is_a_tree_grpo(bed: Bed) -> None:
    """Growth 0, equal bounds, λ = 0; the other tree is BranchGRPO's with two splits inside its window."""
    own = {"credit": SubtreeFusion(), "advantage": Normalized(within="tree_depth")}
    split = found(bed, SplitTree((2, 3), 2, window=2, position=Fixed(2)), group_size=8, **own)
    extra = {"dynamic_clip": DynamicClip(0.1, 0.1), "supervision": {"tuning": LayerTuning(scale=0.0)}}
    dynamic = found(bed, TreeWindow(2, 2, 0.0, position=Fixed(2)), parts=extra, group_size=8, **own)
    check_equal(split, dynamic)
    tuned = {**extra, "supervision": {"tuning": LayerTuning(scale=0.1)}}
    for plan, parts in (
        (TreeWindow(2, 2, 0.5, position=Fixed(2)), extra),
        (TreeWindow(2, 2, 0.0, position=Fixed(2)), tuned),
    ):
        assert not torch.equal(found(bed, plan, parts=parts, group_size=8, **own)[2], split[2])


def test_without_turning_points_tp_grpo_is_dense_grpo(bed: Bed) -> None:
    """Of two steps none can turn but the first: the last has nothing after it."""
    own = {"advantage": Normalized(within="prompt_step")}
    two, four = (Probed(Window(size, 2, 2 + size, shared_start=False)) for size in (2, 4))
    dense = found(bed, two, credit=Gain(), **own)
    check_equal(dense, found(bed, two, credit=TurningPoint(first_step=False), **own))
    turning = found(bed, four, credit=TurningPoint(balanced=False), **own)
    assert not torch.equal(turning[2], found(bed, four, credit=Gain(), **own)[2])


@dataclass(frozen=True)
class Uphill:
    """A process reward of states: their first coordinate."""

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return x.flatten(1)[:, 0]


def test_euphonium_without_guidance_and_process_reward_is_dance_grpo(bed: Bed) -> None:
    """λ = 0; "mode none": the process reward has no term of its own."""
    dance = {"advantage": Normalized(unbiased=True, delta=1e-8)}
    channels = {"outcome": dance["advantage"], "process": Normalized(within="prompt_step")}
    both = {"process": [Potential()], "credit": Joined({"outcome": Broadcast(), "process": Process("potential")})}
    plain = found(bed, Chain(shared_start=True), DanceSDE(0.3), **dance)
    for scale, term, same in ((0.0, 0.0, True), (0.5, 0.0, False), (0.0, 1.0, False)):
        mixed = Mixed(PerChannel(channels), "keep", {"outcome/nearness": 1.0, "process/potential": term})
        kernel = Guided(DanceSDE(0.3), RewardGradient(Uphill()), scale=scale)
        euphonium = found(bed, Chain(shared_start=True), kernel, advantage=mixed, **both)
        assert torch.equal(euphonium[1], plain[1]) == (scale == 0)
        assert torch.equal(euphonium[2], plain[2]) == same


def test_guard_without_weight_has_the_gradient_of_ppo_times_the_std_of_each_step(bed: Bed) -> None:
    """At the first update; StdOverMean multiplies by s over its mean, a constant."""
    guard, ppo = (
        found(bed, Chain(), objective=objective, step_weight=weight)[2]
        for objective, weight in ((Guard(0.1, weight="none"), Uniform()), (ClippedRatio(0.1), StdOverMean()))
    )
    sigmas = bed.policy.sigmas(STEPS, (2, 1, 1)).double()
    stds = FlowSDE().coefficients(sigmas[:-2], sigmas[1:-1], 1.0, torch.arange(STEPS - 1)).std
    torch.testing.assert_close(guard, ppo * float(stds.mean()), rtol=1e-4, atol=1e-7)
    plain = found(bed, Chain())[2]
    assert float(torch.cosine_similarity(guard, plain, 0)) < 0.999  # the weights matter


LEVELS = VariancePreserving(torch.linspace(0.999, 0.02, 20).double())


@pytest.mark.parametrize(
    "kernel",
    [
        ODE(), FlowSDE(), CPS(), Guided(FlowSDE(), RewardGradient(Uphill()), scale=0.5), DPMSolver(FlowSDE()),
        DDIM(1.0).bind(LEVELS), ODE().bind(LEVELS), Guided(DDIM(1.0), RewardGradient(Uphill()), scale=0.5).bind(LEVELS),
    ],
    ids=lambda kernel: type(kernel).__name__,
)  # fmt: skip
def test_every_kernel_says_its_step_by_the_same_three_numbers(kernel) -> None:
    """μ = α·x + b·v and s of `coefficients` are those of the step, and b is the derivative of μ by v."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 2, 1, 1, generator=generator, dtype=torch.float64)
    v.requires_grad_()
    sigma, sigma_next = torch.tensor([0.9, 0.7, 0.3]).double(), torch.tensor([0.8, 0.4, 0.2]).double()
    affine = kernel.coefficients(sigma, sigma_next)
    step = kernel(x, v, sigma, sigma_next, TransitionContext(step=torch.tensor([1, 4, 8])))
    alpha, b = (value[:, None, None, None] for value in (affine.alpha, affine.velocity_coef))
    torch.testing.assert_close(step.policy.mean, alpha * x + b * v)
    torch.testing.assert_close(step.std, affine.std)
    (slope,) = torch.autograd.grad(step.mean.sum(), v)  # of a guided step too: what moves it is a constant
    torch.testing.assert_close(slope, b.expand_as(v))
