"""Ensembles: closed forms of each rule, limits of the soft minimum, gradients, and samples that a member cannot score."""

import itertools
import math

import pytest
import torch

from rewards import Ensemble, Mix, RewardBatch, RewardError, RewardOutput, RewardSpec, Standardized, WithTimeout, score
from rewards.ensembles import combined, spread
from tests.helpers.plain_rewards import Plain
from tests.helpers.reward_parts import in_parts

NAN = math.nan
MEMBERS = torch.tensor([[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
NONE = torch.zeros_like(MEMBERS)


def named(name, values, doubt=None, **options):
    """A member: values by sample id, its uncertainty `doubt`."""

    def answer(batch):
        scores = torch.tensor(values)[batch.sample_ids]
        return RewardOutput(
            scores, ~scores.isnan(), {"half": scores / 2}, uncertainty=None if doubt is None else torch.full_like(scores, doubt)
        )  # fmt: skip

    reward = Plain(answer, RewardSpec(inputs=(), **options))
    reward.name = name
    return reward


def batch(count):
    return RewardBatch(prompts=["p"] * count)


@pytest.mark.parametrize(
    ("how", "coef", "expected"),
    [
        ("mean", None, [3, -1]),
        ("wco", None, [1, -1]),
        ("uwo", 0.3, [3 - 0.3 * 14 / 3, -1]),
        ("uwo", None, [3 - 0.1 * 14 / 3, -1]),
        ("lcb", 2.0, [3 - 2 * math.sqrt(14 / 3), -1]),
        ("softmin", 2.0, [-2 * math.log((math.exp(-0.5) + math.exp(-1) + math.exp(-3)) / 3), -1]),
    ],
)
def test_closed_forms(how, coef, expected):
    assert combined(MEMBERS, NONE, how, coef).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_soft_minimum_goes_from_the_least_to_the_mean():
    members = torch.tensor([[1.0, 2.0, 6.0, 1000.0], [0.0, -3e4, 1.0, 2.0]])
    torch.testing.assert_close(combined(members, NONE, "softmin", 1e-4), members.amin(1), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(combined(members, NONE, "softmin", 1e9), members.mean(1), rtol=1e-4, atol=1e-3)
    betas = [combined(members, NONE, "softmin", beta) for beta in (0.1, 1.0, 10.0, 100.0)]
    assert all(bool((low < high).all()) for low, high in itertools.pairwise(betas))
    second = combined(MEMBERS, NONE, "softmin", 1e3) - combined(MEMBERS, NONE, "uwo", 1 / 2e3)  # mean - var/(2 beta)
    assert float(second.abs().max()) < 1e-5


def test_the_spread_is_the_deviation_of_the_mixture_of_members():
    doubts = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    assert spread(MEMBERS, doubts).tolist() == pytest.approx([math.sqrt(14 / 3 + 14 / 3), 2])
    one = score(Ensemble([named("x", [5.0], doubt=2.0)], how="lcb", coef=1.5), batch(1))
    assert one.scores.item() == 5 - 1.5 * 2 and one.uncertainty.item() == 2


def test_scores_uncertainty_and_components():
    output = score(Ensemble([named("x", [1.0, 4.0]), named("y", [3.0, 4.0])], how="uwo", coef=1.0), batch(2))
    assert output.scores[:, 0].tolist() == [1, 4] and output.uncertainty[:, 0].tolist() == [1, 0]
    assert output.components["x"].tolist() == [1, 4] and output.components["y/half"].tolist() == [1.5, 2]
    assert output.components["spread"].tolist() == [1, 0]


@pytest.mark.parametrize("how", ["mean", "wco", "uwo", "lcb", "softmin"])
def test_gradients_equal_finite_differences_and_are_finite_where_members_agree(how):
    members = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: combined(x, torch.ones_like(x), how), members)
    equal = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(combined(equal, torch.zeros_like(equal), how).sum(), equal)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 3))


def test_gradients_reach_the_members_through_score():
    def part(name, power):
        reward = Plain(
            lambda b: RewardOutput((b.images**power).mean((1, 2, 3)), torch.ones(len(b)).bool()), RewardSpec(differentiable=True)
        )  # fmt: skip
        reward.name = name
        return reward

    images = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ensemble = Ensemble([part("a", 1), part("b", 2), part("c", 3)], how="softmin", coef=0.1)

    def total(pixels):
        return score(ensemble, RewardBatch(prompts=["p", "q"], images=pixels), grad=True).scores.sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    along = torch.randn_like(images)
    slope = (total(images.detach() + 1e-6 * along) - total(images.detach() - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-7, atol=1e-9)


def test_a_sample_that_one_member_cannot_score_is_invalid_alone():
    parts = [named("x", [1.0, NAN, 3.0, 4.0]), named("y", [1.0, 2.0, 3.0, 0.0])]
    for how in ("mean", "wco", "uwo", "lcb", "softmin"):
        output = score(Ensemble(parts, how=how), batch(4))
        assert output.valid[:, 0].tolist() == [True, False, True, True]
        alone = [score(Ensemble(parts, how=how), each, max_fail_rate=1).scores for each in in_parts(batch(4))]
        assert torch.equal(torch.cat(alone).nan_to_num(-9), output.scores.nan_to_num(-9))


def test_a_member_that_explodes_on_one_sample_costs_that_sample_only():
    def answer(b):
        if 2 in b.sample_ids:
            raise ValueError("boom")
        return RewardOutput(torch.tensor(b.sample_ids).float(), torch.ones(len(b)).bool())

    fragile = Plain(answer, RewardSpec(inputs=()))
    members = [WithTimeout(fragile, on_error="mask", batch_size=1), named("y", [0.0, 1.0, 2.0, 3.0])]
    output = score(Ensemble(members, how="wco"), batch(4))
    assert output.valid[:, 0].tolist() == [True, True, False, True] and "boom" in output.info[2]
    assert output.scores[output.valid].tolist() == [0, 1, 3] and output.scores[2].isnan()
    with pytest.raises(RewardError, match=r"'ensemble' failed.*'plain' failed.*boom"):
        score(Ensemble([fragile, named("y", [0.0] * 4)]), batch(4))


def test_standardized_members_decide_alike():
    """Raw, the worst case is always the member with the smallest scale."""
    cosine, tens = named("cosine", [0.2, 0.3]), named("tens", [21.0, 19.0])
    raw = score(Ensemble([cosine, tens], how="wco"), batch(2)).scores[:, 0]
    torch.testing.assert_close(raw, torch.tensor([0.2, 0.3]))
    fair = score(Ensemble([Standardized(cosine, 0.25, 0.05), Standardized(tens, 20, 1)], how="wco"), batch(2)).scores[
        :, 0
    ]
    torch.testing.assert_close(fair, torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "median"}, "got how='median'"),
        ({"how": "mean", "coef": 1.0}, "this rule has no coefficient"),
        ({"how": "uwo", "coef": -1.0}, "expected a number above 0"),
        ({"how": "softmin", "coef": NAN}, "expected a number above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([named("x", [0.0])], **options)


def test_members_of_several_channels_or_of_one_name_are_refused():
    for made in (Ensemble, lambda parts: Mix(parts, [1.0])):
        with pytest.raises(ValueError, match=r"whose channels are \['a', 'b'\]; expected one score per part"):
            made([named("x", [0.0], channels=("a", "b"))])
    with pytest.raises(ValueError, match="different names"):
        Ensemble([named("x", [0.0]), named("x", [0.0])])
