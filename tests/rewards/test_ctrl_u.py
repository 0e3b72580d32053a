"""Ctrl-U's uncertainty weights: closed forms, what their gradient does, and shapes."""

import math

import pytest
import torch

from rewards.ctrl_u import certainty_weighted_loss, class_disagreement, disagreement


def test_disagreement_of_two_is_their_distance_and_of_more_the_mean_over_pairs():
    two = torch.tensor([[1.0, 5.0], [4.0, 5.0]])
    assert disagreement(two).tolist() == [3, 0]
    three = torch.tensor([[1.0], [4.0], [6.0]])
    assert disagreement(three).item() == pytest.approx((3 + 5 + 2) / 3)
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(disagreement(maps), (maps[0] - maps[1]).abs())


def test_class_disagreement_is_the_divergence_of_the_second_from_the_first():
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.3, 0.1])
    logits = torch.stack([p.log() + 3, q.log() - 1])[:, None, :, None]
    expected = 0.6 * math.log(3) + 0.1 * math.log(0.2)
    assert class_disagreement(logits).shape == (1, 1) and class_disagreement(logits).item() == pytest.approx(expected)
    assert class_disagreement(torch.stack([logits[0], logits[0]])).item() == pytest.approx(0, abs=1e-7)


def test_the_loss():
    losses, doubt = torch.tensor([2.0, 1.0]), torch.tensor([0.0, math.log(4)])
    assert certainty_weighted_loss(losses, doubt, 0.1).item() == pytest.approx((2 + 0.25 + 0.1 * math.log(4)) / 2)
    assert certainty_weighted_loss(losses, torch.zeros(2)).item() == pytest.approx(1.5)
    weights = torch.tensor([0.0, 3.0])
    assert certainty_weighted_loss(losses, doubt, 0.1, weights).item() == pytest.approx(0.25 + 0.1 * math.log(4))
    assert certainty_weighted_loss(losses, doubt, 0.1, torch.zeros(2)).item() == 0
    maps = torch.tensor([[[2.0, 4.0]], [[0.0, 0.0]]])
    assert certainty_weighted_loss(maps, torch.zeros_like(maps)).item() == pytest.approx(1.5)


def test_scale_decides_from_which_loss_on_doubt_pays():
    for scale, sign in ((0.1, -1), (10.0, 1)):
        doubt = torch.tensor([0.5], requires_grad=True)
        certainty_weighted_loss(torch.tensor([1.0]), doubt, scale).backward()
        assert doubt.grad.item() == pytest.approx(scale - math.exp(-0.5)) and doubt.grad.sign().item() == sign


def test_a_differentiable_reward_loss_from_repeats():
    """Scores of two repeats of three samples, of a reward of at most 1: the loss is certain where they agree."""

    def loss(scores):
        return certainty_weighted_loss(1 - scores[0], disagreement(scores), 0.3)

    scores = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.4, 0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, scores)
    certain = certainty_weighted_loss(torch.tensor([0.8]), torch.tensor([0.0]))
    assert certain > certainty_weighted_loss(torch.tensor([0.8]), torch.tensor([0.8]), 0.0)


def test_wrong_shapes_and_signs():
    with pytest.raises(ValueError, match="at least 2 repeats"):
        disagreement(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="two repeats"):
        class_disagreement(torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match="expected one shape"):
        certainty_weighted_loss(torch.zeros(2), torch.zeros(2, 1))
    for losses, doubt in ((-1.0, 0.0), (1.0, -0.1)):
        with pytest.raises(ValueError, match="expected at least 0"):
            certainty_weighted_loss(torch.tensor([losses]), torch.tensor([doubt]))
