"""What every truncation of flowalign.truncations keeps, whatever carries gradient; and every loss of a reward."""

import pytest
import torch

import flowalign.objectives
import flowalign.truncations
from flowalign.objectives import Hinge, RewardLoss
from flowalign.truncations import Chains, Passes, Truncation
from samplers import ODE, RectifiedFlow, normal
from samplers.noise import generator
from tests.helpers.parts import check_final, classes_with, example

EXAMPLES = {"Hinge": Hinge(2.0)}
FOUND = classes_with(flowalign.truncations, "passes")
LOSSES = [cls for cls in classes_with(flowalign.objectives, "of") if cls.__module__.endswith("reward_losses")]
every_truncation = pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)
STEPS, ROWS = 8, 4


def built(cls: type):
    return example(cls, EXAMPLES, "tests/conformance/test_truncations.py")


def chains(weight: torch.Tensor, rows: torch.Tensor, calls: list[bool]) -> Chains:
    def velocity(x: torch.Tensor, sigma: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.tanh(weight * x) + sigma[:, None].to(x)

    def noise(*key: int | str) -> torch.Tensor:
        return normal((ROWS, 3), 0, *key).double()[rows]

    sigmas = torch.linspace(1, 0, STEPS + 1).double()
    return Chains(velocity, noise("start"), sigmas, ODE(), RectifiedFlow(), lambda number: noise("copy", number))


def test_all_are_found() -> None:
    assert len(FOUND) >= 8 and len(LOSSES) == 2


@every_truncation
def test_it_is_a_final_truncation(cls: type) -> None:
    check_final(cls, Truncation, flowalign.truncations)


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_a_loss_falls_where_the_reward_rises(cls: type) -> None:
    check_final(cls, RewardLoss, flowalign.objectives)
    reward = torch.tensor([-1.0, 0.0, 1.5], requires_grad=True)
    loss = built(cls).of(reward)
    assert loss.shape == (3,) and bool((loss.diff() < 0).all())
    (slope,) = torch.autograd.grad(loss.sum(), reward)
    assert bool((slope < 0).all())


@every_truncation
def test_it_costs_what_it_says_and_looks_at_finite_samples_with_graph(cls: type) -> None:
    part, weight = built(cls), torch.tensor(0.4).double().requires_grad_()
    passes = part.passes(STEPS)
    assert isinstance(passes, Passes)
    for number in range(6):
        calls: list[bool] = []
        outcome = part.run(chains(weight, torch.arange(ROWS), calls), generator(number, "t"))
        assert sum(calls) == len(outcome.visits) <= passes.graph
        assert len(calls) <= passes.without + passes.graph
        assert len(outcome.looks) == passes.decodes and passes.scores == passes.decodes * len(outcome.words)
        (slope,) = torch.autograd.grad(sum(look.mean() for look in outcome.looks), weight)
        assert bool(slope.isfinite()) and float(slope) != 0
        assert all(look.shape == (ROWS, 3) and bool(look.isfinite().all()) for look in outcome.looks)
        assert outcome.weight is None or outcome.weight.shape == (ROWS,)


@every_truncation
def test_a_sample_does_not_depend_on_its_batch(cls: type) -> None:
    part, weight = built(cls), torch.tensor(0.4).double()
    for number in range(3):
        whole = part.run(chains(weight, torch.arange(ROWS), []), generator(number, "t"))
        alone = part.run(chains(weight, torch.tensor([2]), []), generator(number, "t"))
        for one, other in zip(whole.looks, alone.looks, strict=True):
            torch.testing.assert_close(one[2:3], other, rtol=1e-12, atol=1e-14)
