"""Pairs, their loss, its clipping and its floor, against what can be written down."""

import itertools

import pytest
import torch

from flowalign.objectives.reward_difference import clip_steps, pair_errors, pair_loss, pairs_of, start_variance

F64 = torch.float64
REWARDS = torch.tensor([0.2, 0.9, 0.2, -0.5, 7.0, 3.0, 3.0], dtype=F64)
GROUP = torch.tensor([0, 0, 0, 0, 1, 2, 2])
ALL = torch.ones(7, dtype=torch.bool)


def test_every_pair_of_a_prompt_once_without_ties_and_with_a_prompts_own_weight() -> None:
    """Prompt 0: six pairs, one of them a tie; prompt 1 has one sample, prompt 2 a tie only: both count as 0."""
    pairs = pairs_of(REWARDS, ALL, GROUP)
    found = set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert found == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}
    assert pairs.samples.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(pairs.gap, REWARDS[pairs.better] - REWARDS[pairs.worse], rtol=0, atol=0)
    torch.testing.assert_close(pairs.weight, torch.full((5,), 1 / (5 * 3), dtype=F64))


@pytest.mark.parametrize("score", [float("nan"), 100.0])
def test_a_sample_without_a_score_leaves_its_pairs(score: float) -> None:
    rewards, valid = REWARDS.clone(), ALL.clone()
    rewards[1], valid[1] = score, False
    pairs = pairs_of(rewards, valid, GROUP)
    assert set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == {(0, 3), (2, 3)}
    torch.testing.assert_close(pairs.weight, torch.full((2,), 1 / (2 * 3), dtype=F64))


def test_equal_rewards_give_a_loss_of_zero_and_no_gradient() -> None:
    pairs = pairs_of(torch.full((4,), 0.7), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64))
    implicit = torch.randn(4, dtype=F64).requires_grad_()
    loss = pair_loss(implicit, implicit, pairs, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and implicit.grad is not None and not implicit.grad.any()


def test_the_loss_by_hand() -> None:
    pairs = pairs_of(torch.tensor([1.0, 0.0, 0.5]), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    implicit = torch.tensor([0.3, -0.2, 0.9], dtype=F64)
    beta, expected = 0.5, []
    for a, b, gap in ((0, 1, 1.0), (0, 2, 0.5), (2, 1, 0.5)):
        expected.append((float(implicit[a] - implicit[b]) - gap / beta) ** 2)
    assert float(pair_loss(implicit, implicit, pairs, beta)) == pytest.approx(sum(expected) / 3, rel=1e-14)


@pytest.mark.parametrize("sign", [1, -1], ids=["first is better", "second is better"])
def test_clipping_stops_what_went_far_enough_and_pulls_back_what_went_astray(sign: int) -> None:
    """Two samples of three steps each; old log-ratios 0, so the implicit rewards have to move apart by sign·10.

    `towards`: every step outside its range on the way to the target: no gradient. `away`: outside on the other side: all of
    the gradient. `inside`: the plain one. `one step`: the one step outside has no gradient where the clipped error is the larger."""
    rewards = torch.tensor([float(sign), 0.0], dtype=F64)
    pairs = pairs_of(rewards, torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))
    beta, limit, old = 0.1, 0.1, torch.zeros(2, 3, dtype=F64)

    def gradient(first: list[float], second: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.tensor([first, second], dtype=F64).requires_grad_()
        clipped = clip_steps(steps, old, limit)
        loss = pair_loss(steps.sum(1), clipped.sum(1), pairs, beta)
        error = float(pair_errors(steps.sum(1), pairs, beta)[0].detach())
        (found,) = torch.autograd.grad(loss, steps)
        plain = torch.full((2, 3), 2 * error, dtype=F64)
        plain[1 if sign > 0 else 0] *= -1
        return found, plain

    far = sign * 0.4
    found, _ = gradient([far] * 3, [-far] * 3)
    assert torch.equal(found, torch.zeros(2, 3, dtype=F64))
    found, plain = gradient([-far] * 3, [far] * 3)
    torch.testing.assert_close(found, plain, rtol=1e-14, atol=0)
    found, plain = gradient([0.05, -0.02, 0.01], [0.03, 0.0, -0.09])
    torch.testing.assert_close(found, plain, rtol=1e-14, atol=0)
    found, plain = gradient([far, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert float(found[0, 0]) == 0.0
    clipped_error = abs(limit - 1 / beta)
    torch.testing.assert_close(found[0, 1:].abs(), torch.full((2,), 2 * clipped_error, dtype=F64))


def test_the_range_lies_around_the_rollout_not_the_reference() -> None:
    old = torch.tensor([0.5, -0.5], dtype=F64)
    found = clip_steps(torch.tensor([0.7, -0.45], dtype=F64), old, 0.1)
    torch.testing.assert_close(found, torch.tensor([0.6, -0.45], dtype=F64))


def test_a_constant_added_to_a_prompts_rewards_and_the_order_of_samples_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    implicit, clipped = torch.randn(2, 7, generator=generator, dtype=F64)
    loss = pair_loss(implicit, clipped, pairs_of(REWARDS, ALL, GROUP), 0.3)
    shifted = REWARDS + torch.tensor([2.0, -1.0, 5.0], dtype=F64)[GROUP]
    torch.testing.assert_close(pair_loss(implicit, clipped, pairs_of(shifted, ALL, GROUP), 0.3), loss)
    order = torch.randperm(7, generator=generator)
    moved = pair_loss(implicit[order], clipped[order], pairs_of(REWARDS[order], ALL, GROUP[order]), 0.3)
    torch.testing.assert_close(moved, loss)


def test_the_gradient_without_clipping_is_that_of_centered_rewards() -> None:
    """Σ over pairs of (u_i − u_j)(g_i − g_j) = B·Σ (u_i − ū)·g_i."""
    generator = torch.Generator().manual_seed(1)
    rewards, implicit = torch.randn(2, 6, generator=generator, dtype=F64)
    implicit.requires_grad_()
    pairs, beta = pairs_of(rewards, torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)), 0.2
    (found,) = torch.autograd.grad(pair_loss(implicit, implicit, pairs, beta), implicit)
    shaped = rewards - beta * implicit.detach()
    torch.testing.assert_close(found, -(2 * 6 / beta) * (shaped - shaped.mean()) / 15)


@pytest.mark.parametrize("starts", [2, 5])
def test_the_variance_of_the_starts_has_no_bias(starts: int) -> None:
    """Starts 0 or 1 with equal probability, two samples each, noise ±½: all outcomes of two starts; a sample of them for more."""
    if starts == 2:
        outcomes = list(itertools.product([0.0, 1.0], repeat=2))
        noises = list(itertools.product([-0.5, 0.5], repeat=4))
        rows = [[s[n // 2] + e[n] for n in range(4)] for s in outcomes for e in noises]
        values = torch.tensor(rows, dtype=F64)
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, 2, (4000, starts), generator=generator).repeat_interleave(2, 1)
        values = drawn + torch.randint(0, 2, (4000, 2 * starts), generator=generator) - 0.5
    start = torch.arange(starts).repeat_interleave(2)
    one_group = torch.zeros(2 * starts, dtype=torch.int64)
    # 100 groups at once: their mean is far from 0, so that "at least 0" does not act
    every = values.repeat(-(-1600 // len(values)), 1)[:1600]
    found = start_variance(
        every.flatten(), (torch.arange(1600)[:, None] * starts + start).flatten(),
        (torch.arange(1600)[:, None] + one_group).flatten(),
    )  # fmt: skip
    assert found == pytest.approx(0.25, abs=1e-9 if starts == 2 else 0.02)


def test_the_variance_of_the_starts_is_unknown_without_two_starts_or_two_samples_of_one() -> None:
    values, zeros = torch.arange(4.0), torch.zeros(4, dtype=torch.int64)
    assert start_variance(values, torch.arange(4), zeros) is None
    assert start_variance(values, zeros, zeros) is None
    assert start_variance(torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.tensor([0, 0, 1, 1]), zeros) == 0.0
