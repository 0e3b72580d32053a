"""Reward back-propagation in a discrete diffusion model against closed forms and enumeration, in float64."""

import copy
import itertools
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Summed
from flowalign.toy_sequences import Drakes, MotifCount, SmallDenoiser, levels, masked, unmask
from flowalign.trainers import AdamWConfig
from rewards import RewardBatch, score
from samplers import generator

OLD = torch.tensor([0.3, -0.4], dtype=torch.float64).log_softmax(0)
REWARD = torch.tensor([0.2, 1.0], dtype=torch.float64)


def constant(log_p: Tensor):
    """A denoiser of one position that does not look at its input."""
    return lambda states: log_p.expand(len(states), 1, 2)


def quantiles(count: int) -> Tensor:
    """[1, count, 1, 3] Gumbel noise of which only the difference of the two tokens matters, a logistic: its quantiles."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.zeros(1, count, 1, 3, dtype=torch.float64)
    noise[0, :, 0, 1] = (u / (1 - u)).log()
    return noise


def one_step(logits: Tensor, temperature: float, count: int = 20000):
    start = masked(count, 1, 2).double()
    return unmask(
        constant(logits.log_softmax(0)),
        constant(OLD),
        start,
        levels(1),
        quantiles(count),
        relaxed=1,
        temperature=temperature,
    )


def test_the_relaxed_gradient_of_one_token_approaches_the_enumerated_one() -> None:
    """d/dlogits of Σ p r = p·(r − E r); the bias falls as the square of the temperature."""
    logits = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * REWARD).sum(), logits)
    errors = []
    for temperature in (0.4, 0.2, 0.1):
        path = one_step(logits, temperature)
        assert sorted(path.tokens.detach().unique().tolist()) == [0.0, 1.0]  # straight-through: the values are hard
        value = (path.tokens[:, 0] @ REWARD).mean()
        assert value.item() == pytest.approx(float((p.detach() * REWARD).sum()), abs=1e-4)
        (found,) = torch.autograd.grad(value, logits)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[2] < 0.01 and errors[0] / errors[1] == pytest.approx(4, rel=0.3), errors
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3), errors


def test_one_token_ends_at_the_tilted_law() -> None:
    """S = 1, one position, two tokens: the optimum of E r − α·KL is softmax(ln p_old + r/α)."""
    alpha, temperature = 0.7, 0.05
    logits = OLD.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    for _ in range(60):
        path = one_step(logits, temperature, 4000)
        optimizer.zero_grad()
        (-(path.tokens[:, 0] @ REWARD).mean() + alpha * path.kl.mean()).backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(0), (OLD + REWARD / alpha).softmax(0), rtol=0, atol=2e-3)


def paths(denoiser, mask: Tensor, length: int, tokens: int):
    """All (probability, end) of hard paths from masks alone."""
    found = [(torch.ones((), dtype=torch.float64), (tokens,) * length)]
    for number in range(len(mask) - 1):
        stay, grown = mask[number + 1] / mask[number], []
        for probability, state in found:
            p = denoiser(one_hot(torch.tensor([state]), tokens + 1).double())[0].exp()
            choices = [
                [(stay, tokens), *(((1 - stay) * p[place, token], token) for token in range(tokens))]
                if at == tokens
                else [(1.0, at)]
                for place, at in enumerate(state)
            ]
            for one in itertools.product(*choices):
                weight = probability
                for factor, _ in one:
                    weight = weight * factor
                grown.append((weight, tuple(token for _, token in one)))
        found = [(weight, state) for weight, state in grown if float(weight) > 0]
    return found


def test_the_kl_of_a_path_is_that_of_all_paths() -> None:
    torch.manual_seed(0)
    own, other = SmallDenoiser(2, 2, 8).double(), SmallDenoiser(2, 2, 8).double()
    for parameter in own.parameters():
        parameter.data *= 3
    mask = levels(3)
    with torch.no_grad():
        mine, theirs = paths(own, mask, 2, 2), paths(other, mask, 2, 2)
        exact = sum(float(p) * float((p / q).log()) for (p, _), (q, _) in zip(mine, theirs, strict=True))
        assert sum(float(p) for p, _ in mine) == pytest.approx(1)
        count = 40000
        gumbel = torch.from_numpy(generator(0, "step").gumbel(size=(3, count, 2, 3)))
        path = unmask(own, other, masked(count, 2, 2).double(), mask, gumbel, relaxed=0, temperature=1.0)
    spread = float(path.kl.std()) / count**0.5
    assert exact > 20 * spread and abs(float(path.kl.mean()) - exact) < 4 * spread
    # and hard samples have the law of the paths' ends
    ends = torch.zeros(4, dtype=torch.float64)
    for p, state in mine:
        ends[2 * state[0] + state[1]] += float(p)
    drawn = (path.tokens.argmax(-1) * torch.tensor([2, 1])).sum(1).bincount(minlength=4) / count
    assert (drawn - ends).abs().max() < 4 * (0.25 / count) ** 0.5


def test_steps_before_the_relaxed_ones_are_hard_and_carry_no_gradient_to_the_sample() -> None:
    torch.manual_seed(0)
    denoiser = SmallDenoiser(4, 3, 16)
    gumbel = torch.from_numpy(generator(0, "step").gumbel(size=(4, 5, 4, 4))).float()
    for relaxed in (0, 2, 4):
        path = unmask(denoiser, denoiser, masked(5, 4, 3), levels(4), gumbel, relaxed=relaxed, temperature=0.5)
        assert [bool(((x == 0) | (x == 1)).all()) for x in path.states] == [
            number <= 4 - relaxed for number in range(4)
        ]
        assert bool((path.tokens.sum(-1) - 1).abs().max() < 1e-6) and not bool(path.kl.any())
        gradients = (
            torch.autograd.grad(path.tokens.sum((0, 1))[0], denoiser.parameters(), allow_unused=True, retain_graph=True)
            if relaxed
            else []
        )
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
        assert path.tokens.requires_grad == (relaxed > 0)


def test_motifs_are_counted_with_a_gradient() -> None:
    tokens = one_hot(torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [2, 0, 1, 0]]), 3).float().requires_grad_()
    batch = RewardBatch(prompts=[""] * 3, latents=tokens, sigma=torch.zeros(3))
    scores = score(MotifCount((0, 1)), batch, grad=True).scores[:, 0]
    assert scores.tolist() == [2, 0, 1]
    scores.sum().backward()
    assert (
        tokens.grad is not None and float(tokens.grad[1, 1:, 1].abs().max()) == 0 and float(tokens.grad[1, 0, 0]) == 1
    )


def test_a_small_run_reaches_a_better_reward_with_bounded_kl() -> None:
    torch.manual_seed(0)
    before = SmallDenoiser(4, 3, 32)
    trainer = Drakes(
        copy.deepcopy(before), before.requires_grad_(False), MotifCount((0, 1)), 4, 3, steps=4, relaxed=4, alpha=0.3,
        count=64, optimizer=AdamWConfig(lr=1e-2, weight_decay=0.0),
    )  # fmt: skip
    for iteration in range(40):
        for update in trainer.updates(iteration):
            stepper = Summed(update.optimizer, Processes())
            [loss] = update.micro_batches
            stepper.backward(loss())
            assert stepper.step(update.max_grad_norm) > 0
            assert iteration > 0 or update.after()["kl/path"] == 0
    with torch.no_grad():
        old, new = trainer._path(before, -2, 2048, 0), trainer._path(trainer.denoiser, -2, 2048, 0)
        first, reward, kl = float(trainer.scores(old).mean()), float(trainer.scores(new).mean()), float(new.kl.mean())
    value, highest = reward - trainer.alpha * kl, trainer.highest(2048)
    assert reward > 2 * first and 0 < kl < (reward - first) / trainer.alpha
    assert first + 0.6 * (highest - first) < value < highest + 0.03


def test_the_same_iteration_has_the_same_samples() -> None:
    torch.manual_seed(0)
    net = SmallDenoiser(4, 3, 8)
    one, more = (Drakes(net, net, MotifCount(), 4, 3, steps=3, relaxed=1, count=count) for count in (2, 5))
    assert torch.equal(one.path(3).tokens, more.path(3).tokens[:2]) and not torch.equal(
        one.path(3).tokens, one.path(4).tokens
    )
    with pytest.raises(ValueError, match="expected 1 <= relaxed <= steps=3"):
        Drakes(net, net, MotifCount(), 4, 3, steps=3, relaxed=4)


def test_the_kl_of_relaxed_steps_has_its_whole_gradient() -> None:
    """Of both models: each sees the relaxed states that the policy made."""
    generated = torch.Generator().manual_seed(0)
    weights, other = torch.randn(2, 6, 4, generator=generated, dtype=torch.float64)
    gumbel = torch.randn(3, 2, 2, 3, generator=generated, dtype=torch.float64)

    def linear(matrix: Tensor):
        return lambda states: (states.flatten(1) @ matrix).view(-1, 2, 2).log_softmax(-1)

    def kl(matrix: Tensor) -> Tensor:
        start = masked(2, 2, 2).double()
        return unmask(linear(matrix), linear(other), start, levels(3), gumbel, relaxed=3, temperature=0.5).kl

    assert torch.autograd.gradcheck(kl, weights.requires_grad_())


def test_in_pre_training_each_number_of_masks_weighs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 1/m, the gradient by log p of the states with k masks is −k·∫ C(L, k)·m^k·(1 − m)^(L − k)/m dm = −1, whatever k. Levels
    below 0.1, which the script raises, hardly have three masks."""

    class ByMasks(nn.Module):
        """One log p for all tokens of the states with as many masks."""

        def __init__(self, length: int, tokens: int) -> None:
            super().__init__()
            self.log_p = nn.Parameter(torch.zeros(length + 1))

        def forward(self, states: Tensor) -> Tensor:
            return self.log_p[states[..., -1].sum(1).long()][:, None, None].expand_as(states[..., :-1])

    pretrained = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "drakes.py"))["pretrained"]
    monkeypatch.setitem(pretrained.__globals__, "SmallDenoiser", ByMasks)
    found = pretrained(updates=1, count=40_000).log_p.grad  # a standard error is 0.02
    torch.testing.assert_close(found[3:], torch.full_like(found[3:], -1), rtol=0, atol=0.08)
