"""What every objective of transitions and every step weight of flowalign.objectives keeps, whatever it computes."""

from dataclasses import replace

import pytest
import torch

import flowalign.objectives
from flowalign.objectives import Agreement, Guard, Objective, StepWeight, Transitions
from samplers import CPS, DDIM, DanceSDE, FlowSDE, RectifiedFlow, Tree, window
from tests.helpers.kernels import VP
from tests.helpers.parts import check_final, classes_with, example
from tests.helpers.trees import grown

# other weights of Guard multiply the loss, see tests/objectives
EXAMPLES = {"Guard": Guard(weight="none"), "Agreement": Agreement("x0_r")}
OBJECTIVES = classes_with(flowalign.objectives, "log_ratio")
WEIGHTS = classes_with(flowalign.objectives, "weigh")
every_objective = pytest.mark.parametrize("cls", OBJECTIVES, ids=lambda cls: cls.__name__)
every_weight = pytest.mark.parametrize("cls", WEIGHTS, ids=lambda cls: cls.__name__)
on_each_kernel = pytest.mark.parametrize(
    "kernel", [FlowSDE(), DanceSDE(), CPS(), CPS(constants="full"), FlowSDE(reduce="sum")], ids=str
)
F64 = torch.float64


def built(cls: type):
    return example(cls, EXAMPLES, "tests/conformance/test_objectives.py")


class Steps:
    """Three transitions of five elements in float64, under velocities near those of the rollout."""

    def __init__(self, kernel) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernel = kernel
        self.x, self.v, noise = (torch.randn(3, 5, generator=generator, dtype=F64) for _ in range(3))
        self.old = self._step(self.v)
        self.arrived = self.old.sample(noise)
        self.advantages = torch.tensor([[1.3, -0.2], [-0.4, 0.1], [0.0, 0.7]], dtype=F64)

    def _step(self, v: torch.Tensor):
        return self.kernel(self.x, v, torch.tensor([0.9, 0.7, 0.4]), torch.tensor([0.8, 0.55, 0.3]))

    def __call__(self, v: torch.Tensor):
        """(log_prob [E], old log_prob [E], transitions)."""
        step = self._step(v)
        transitions = Transitions(step, self.arrived, self.old)
        return step.log_prob(self.arrived), self.old.log_prob(self.arrived), transitions

    def gradient(self, function) -> torch.Tensor:
        """∂ of each row's function(v) [E] by its velocity [E, 5], by central differences at the rollout's velocities."""
        columns = []
        for element in range(5):
            nudge = torch.zeros_like(self.v)
            nudge[:, element] = 1e-7
            columns.append((function(self.v + nudge) - function(self.v - nudge)) / 2e-7)
        return torch.stack(columns, 1)


def test_all_are_found() -> None:
    assert OBJECTIVES and WEIGHTS and not set(OBJECTIVES) & set(WEIGHTS)


@every_objective
def test_it_is_a_final_objective(cls: type) -> None:
    check_final(cls, Objective, flowalign.objectives)


@on_each_kernel
@every_objective
def test_at_ratio_one_the_loss_is_minus_the_advantage(cls: type, kernel) -> None:
    objective, steps = built(cls), Steps(kernel)
    log_prob, old, transitions = steps(steps.v)
    assert torch.equal(objective.log_ratio(log_prob, old, transitions), torch.zeros(3, dtype=F64))
    loss = objective.loss(log_prob, old, steps.advantages, transitions)
    torch.testing.assert_close(loss, -steps.advantages.sum(1))
    clipped = objective.clipped(log_prob, old, steps.advantages, transitions)
    assert clipped.dtype == torch.bool and clipped.tolist() == [False] * 3
    limit = objective.drift_limit(transitions)
    assert limit.shape == (3,) and bool((limit > 0).all())


@on_each_kernel
@every_objective
def test_at_ratio_one_the_gradient_is_that_of_the_log_prob(cls: type, kernel) -> None:
    """−A·∂(log ratio), by autograd and by finite differences; the log ratio moves as ln p does, in each row by a factor."""
    objective, steps = built(cls), Steps(kernel)
    v = steps.v.clone().requires_grad_()
    log_prob, old, transitions = steps(v)
    (gradient,) = torch.autograd.grad(objective.loss(log_prob, old, steps.advantages, transitions).sum(), v)
    of_ratio = steps.gradient(lambda v: objective.log_ratio(*steps(v)))
    torch.testing.assert_close(gradient, -steps.advantages.sum(1, keepdim=True) * of_ratio, rtol=1e-5, atol=1e-6)

    def loss(v: torch.Tensor) -> torch.Tensor:
        log_prob, old, transitions = steps(v)
        return objective.loss(log_prob, old, steps.advantages, transitions)

    torch.testing.assert_close(gradient, steps.gradient(loss), rtol=1e-5, atol=1e-6)
    of_log_prob = steps.gradient(lambda v: steps(v)[0])
    parallel = torch.cosine_similarity(of_ratio, of_log_prob, dim=1)
    torch.testing.assert_close(parallel, torch.ones(3, dtype=F64), rtol=0, atol=1e-8)
    if not objective.needs_old_means:
        torch.testing.assert_close(of_ratio, of_log_prob)


@every_objective
def test_it_works_without_what_it_does_not_ask_for(cls: type) -> None:
    objective, steps = built(cls), Steps(FlowSDE())
    log_prob, old, transitions = steps(steps.v + 0.3)
    plain = objective.loss(log_prob, old, steps.advantages, transitions)
    if not objective.needs_old_means:
        alone = objective.loss(log_prob, old, steps.advantages, Transitions(transitions.step, steps.arrived))
        assert torch.equal(alone, plain)
    wide = torch.full((3, 2, 2), 1e3, dtype=F64)
    wider = Transitions(transitions.step, steps.arrived, steps.old, wide)
    assert torch.equal(objective.loss(log_prob, old, steps.advantages, wider), plain) != (objective.clip is not None)


# ---------------------------------------------------------------------------------------------- step weights


@every_weight
def test_it_is_a_final_step_weight(cls: type) -> None:
    check_final(cls, StepWeight, flowalign.objectives)


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS(), CPS(constants="full")], ids=str)
@every_weight
def test_weights_are_positive_and_belong_to_their_edges(cls: type, kernel) -> None:
    weight = built(cls)
    weight.check(RectifiedFlow())
    forest = grown(Tree.cat([window(6, 2, start, 1) for start in range(5)]), kernel)
    _positive(weight, forest)


@every_weight
def test_a_weight_of_flows_refuses_other_paths_and_the_others_are_right_there(cls: type) -> None:
    weight = built(cls)
    try:
        weight.check(VP)
    except ValueError as error:
        assert "take" in str(error) and type(VP).__name__ in str(error)
        return
    forest = grown(Tree.cat([window(6, 2, start, 1) for start in range(5)]))
    levels = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1])
    _positive(weight, replace(forest, kernel=DDIM(0.6).bind(VP), sigmas=levels))


def _positive(weight: StepWeight, forest) -> None:
    """One weight per edge, above 0 and finite, the same whatever order the edges are asked in."""
    known, edges = torch.linspace(0, 1, len(forest.tree)), forest.tree.edges
    forest = forest.with_scores("uncertainty/r", known).with_scores("x0_r", known)

    def weights(asked: torch.Tensor) -> torch.Tensor:
        parents, position = forest.tree.distinct_parents(asked)
        return weight.weigh(forest.edge_steps(asked, torch.zeros(len(parents), 3), position), forest, asked)

    got, flipped = weights(edges), weights(edges.flip(0))
    assert got.shape == edges.shape and got.dtype == torch.float32
    assert bool((got > 0).all()) and bool(got.isfinite().all())
    torch.testing.assert_close(flipped.flip(0), got)
