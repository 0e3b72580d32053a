"""Standardized, capped and gated scores: closed forms, ranges, uncertainty, gradients."""

import math

import pytest
import torch

from rewards import Capped, Gated, RewardBatch, RewardError, RewardOutput, RewardSpec, Standardized, score
from tests.helpers.plain_rewards import Plain
from tests.helpers.reward_parts import in_parts

NAN = math.nan


def reward(values, name="x", doubt=None, **options):
    def answer(batch):
        scores = torch.tensor(values)[batch.sample_ids]
        uncertainty = None if doubt is None else torch.full_like(scores, doubt)
        return RewardOutput(scores, ~scores.isnan(), {}, uncertainty=uncertainty)

    made = Plain(answer, RewardSpec(inputs=(), **options))
    made.name = name
    return made


def batch(count):
    return RewardBatch(prompts=["p"] * count)


def brightness(power=1):
    return Plain(
        lambda b: RewardOutput((b.images**power).mean((1, 2, 3)), torch.ones(len(b)).bool()),
        RewardSpec(differentiable=True, range=(0, 1)),
    )


def slopes(made, images):
    """Autograd and finite differences of the summed score along one direction."""

    def total(pixels):
        return score(made, RewardBatch(prompts=["p"] * len(pixels), images=pixels), grad=True).scores.sum()

    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    along = torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(0))
    return (gradient * along).sum(), (total(images + 1e-6 * along) - total(images - 1e-6 * along)) / 2e-6


def test_standardized():
    made = Standardized(reward([22.0, 20.0, NAN], doubt=3.0, range=(16, 26)), loc=20, scale=-2)
    output = score(made, batch(3))
    assert output.scores[:2, 0].tolist() == [-1, 0] and output.valid[:, 0].tolist() == [True, True, False]
    assert output.uncertainty[:2, 0].tolist() == [1.5, 1.5] and output.components["raw"][:2].tolist() == [22, 20]
    assert made.name == "x" and made.spec.range == (-3, 2)
    assert Standardized(reward([0.0]), 1, 2).spec.range is None


def test_several_channels_are_changed_alike():
    two = reward([[1.0, 2.0], [3.0, 5.0]], channels=("a", "b"))
    output = score(Standardized(two, loc=1, scale=2), batch(2))
    assert output.scores.tolist() == [[0, 0.5], [1, 2]] and output.components["raw/b"].tolist() == [2, 5]
    assert score(Capped(two, high=2), batch(2)).scores.tolist() == [[1, 2], [2, 2]]


def test_capped():
    values = [-9.0, 0.5, 2.0]
    assert score(Capped(reward(values), low=0, high=1), batch(3)).scores[:, 0].tolist() == [0, 0.5, 1]
    assert score(Capped(reward(values), high=1), batch(3)).scores[:, 0].tolist() == [-9, 0.5, 1]
    soft = score(Capped(reward(values), low=-3, high=3, soft=True), batch(3)).scores[:, 0].tolist()
    assert soft == pytest.approx([3 * math.tanh(value / 3) for value in values])
    shifted = score(Capped(reward([2.0]), low=0, high=2, soft=True), batch(1)).scores.item()
    assert shifted == pytest.approx(1 + math.tanh(1))
    assert Capped(reward(values), low=0).spec.range == (0, math.inf)
    known = reward([0.3], range=(0, 1))
    assert Capped(known, high=0.8).spec.range == (0, 0.8)  # and not from -inf, which no gate could fall back to
    shut = Gated(Capped(known, high=0.8), reward([0.0], name="gate"), 0.5)
    assert score(shut, batch(1)).scores.item() == 0
    assert Capped(known, -1, 1, soft=True).spec.range == pytest.approx((0, math.tanh(1)))
    assert Capped(known, low=2).spec.range == (2, math.inf)  # all scores are 2


def test_gated():
    own, gate = (
        reward([0.9, 0.8, 0.7, NAN, 0.6], range=(0, 1), doubt=0.1),
        reward([1.0, 5.0, 4.9, 9.0, NAN], name="gate"),
    )
    output = score(Gated(own, gate, threshold=4.9), batch(5))
    assert output.scores[:3, 0].tolist() == pytest.approx([0, 0.8, 0.7])
    assert output.valid[:, 0].tolist() == [True, True, True, False, False]
    assert output.components["open"][:3].tolist() == [0, 1, 1] and output.components["x"][0] == pytest.approx(0.9)
    assert output.uncertainty[:3, 0].tolist() == pytest.approx([0, 0.1, 0.1])
    other = score(Gated(own, Standardized(gate, scale=-1), -4.0, otherwise=-2.0), batch(5))  # at most 4
    assert other.scores[:3, 0].tolist() == pytest.approx([0.9, -2, -2])


def test_gradients():
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    hard = Plain(lambda b: RewardOutput(b.sample_ids_, torch.ones(3).bool()))
    hard.answer = lambda b: RewardOutput((b.images[:, 0, 0, 0] > 0.5).float(), torch.ones(len(b)).bool())
    hard.name = "gate"
    for made in (
        Standardized(brightness(2), 0.3, -0.1),
        Capped(brightness(2), high=0.33),
        Capped(brightness(), low=0.4, high=0.6, soft=True),
        Gated(brightness(3), hard, 0.5),
    ):
        by_graph, by_difference = slopes(made, images)
        torch.testing.assert_close(by_graph, by_difference, rtol=1e-6, atol=1e-9)
    with pytest.raises(RewardError, match="which this is not"):
        score(Gated(hard, brightness(), 0.5, 0.0), RewardBatch(prompts=["p"], images=images[:1]), grad=True)


def test_a_closed_gate_sends_the_gradient_zero():
    shut = Plain(lambda b: RewardOutput(torch.zeros(len(b)), torch.ones(len(b)).bool()))
    shut.name = "gate"
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = score(Gated(brightness(), shut, 1.0), RewardBatch(prompts=["p"] * 2, images=images), grad=True).scores
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert scores[:, 0].tolist() == [0, 0] and float(gradient.abs().max()) == 0


def test_batch_mates_do_not_matter():
    own, gate = reward([0.9, 0.8, 0.7, 0.1], range=(0, 1)), reward([1.0, 5.0, 4.9, 0.0], name="gate")
    for made in (Standardized(own, 1, 2), Capped(own, high=0.75), Gated(own, gate, 2.0)):
        alone = torch.cat([score(made, part).scores for part in in_parts(batch(4))])
        assert torch.equal(alone, score(made, batch(4)).scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: Standardized(x, scale=0), "scale not 0"),
        (lambda x: Standardized(x, loc=NAN), "expected finite numbers"),
        (lambda x: Capped(x), "at least one bound"),
        (lambda x: Capped(x, low=1, high=1), "low < high"),
        (lambda x: Capped(x, high=1, soft=True), "expected both bounds"),
        (lambda x: Gated(x, reward([0.0], "gate"), 1.0), "set `otherwise`"),
        (lambda x: Gated(x, reward([0.0]), 1.0, 0.0), "different names"),
        (lambda x: Gated(x, reward([[0.0]], "g", channels=("a", "b")), 1.0, 0.0), "expected one score per part"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(reward([0.0]))
