"""Gradients of rewards, through `score`, functions and mixes: equal to finite differences, 0 where there is no score."""

import pytest
import torch

from rewards import (
    Channels,
    FunctionReward,
    JPEGCompressibility,
    Mix,
    RewardBatch,
    RewardError,
    RewardOutput,
    RewardSpec,
    WithTimeout,
    score,
)
from tests.helpers.plain_rewards import Plain, brightness

IMAGES = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SOURCE = """
import torch
def contrast(images, prompts):
    return images.std(dim=(1, 2, 3)) ** 2 + images[:, 0].sin().sum((1, 2))
def pair(images, prompts, weight):
    red = images[:, 0].mean((1, 2))
    return torch.stack([red ** 3, red * torch.tensor(weight, dtype=red.dtype)], 1)
def rough(images, prompts):
    return images.round().mean((1, 2, 3)).detach()
def bare(images, prompts):
    return [0.0] * len(prompts)
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)

    def made(name: str, *channels: str) -> FunctionReward:
        return FunctionReward(f"{tmp_path}/mine.py:{name}", channels=channels, differentiable=True)

    return made


def batch(images: torch.Tensor) -> RewardBatch:
    return RewardBatch(prompts=["a", "b", "c"], images=images, metadata=[{"weight": w} for w in (1.0, 2.0, 3.0)])


def total(reward, images: torch.Tensor) -> torch.Tensor:
    output = score(reward, batch(images), grad=True, max_fail_rate=1.0)
    return torch.where(output.valid, output.scores, 0).sum()


def check_by_finite_differences(reward) -> None:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(reward, images), images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        along = torch.randn(IMAGES.shape, generator=generator, dtype=torch.float64)
        slope = (total(reward, IMAGES + 1e-6 * along) - total(reward, IMAGES - 1e-6 * along)) / 2e-6
        torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-7, atol=1e-8)


def test_through_a_function_a_mix_channels_and_a_time_limit(functions) -> None:
    one, pair = functions("contrast"), functions("pair", "cube", "line")
    bright = FunctionReward("flowalign.diagnostics.measure:brightness", differentiable=True)
    mix = Mix([one, bright], [0.3, -2.0])
    for reward in (one, pair, mix, Channels([mix, pair]), WithTimeout(pair, timeout=60.0, batch_size=2)):
        check_by_finite_differences(reward)


def test_a_masked_row_has_the_gradient_zero_and_harms_no_other() -> None:
    """The middle image scores √0, whose slope is infinite; the reward calls it invalid, or answers nan there."""

    def root(batch: RewardBatch) -> RewardOutput:
        middle = torch.tensor([[float(prompt == "b")] for prompt in batch.prompts], dtype=torch.float64)
        scores = ((batch.images.mean((1, 2, 3)) * (1 - middle[:, 0])).sqrt()) / (1 - middle[:, 0])
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))

    reward = Plain(root, RewardSpec(differentiable=True))
    bright = FunctionReward("flowalign.diagnostics.measure:brightness", differentiable=True)
    for judged in (reward, Mix([reward, bright], [1.0, 1.0])):
        images = IMAGES.clone().requires_grad_()
        output = score(judged, batch(images), grad=True)
        assert output.valid[:, 0].tolist() == [True, False, True]
        torch.where(output.valid, output.scores, 0).sum().backward()
        assert bool(images.grad.isfinite().all()) and float(images.grad[1].abs().max()) == 0
        assert float(images.grad[[0, 2]].abs().min()) > 0
        check_by_finite_differences(judged)


def test_an_input_that_is_not_finite_gets_no_gradient(functions) -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0] = torch.inf
    images.requires_grad_()
    total(functions("contrast"), images).backward()
    assert float(images.grad[0].abs().max()) == 0 and bool(images.grad[1:].isfinite().all())
    assert float(images.grad[1:].abs().max()) > 0


def test_through_latents() -> None:
    latents = torch.randn(3, 6, requires_grad=True)
    reward = Plain(
        lambda b: RewardOutput((b.latents**2).sum(1) * b.sigma, torch.ones(3).bool()),
        RewardSpec(("latents",), "latent", differentiable=True),
    )
    states = RewardBatch(prompts=["a"] * 3, latents=latents, sigma=torch.tensor([0.0, 0.5, 1.0]))
    score(reward, states, grad=True).scores.sum().backward()
    torch.testing.assert_close(latents.grad, 2 * latents.detach() * states.sigma[:, None])


def test_a_gradient_that_cannot_be_is_an_error_not_a_zero(functions) -> None:
    images = IMAGES.clone().requires_grad_()
    for reward in (
        JPEGCompressibility(),
        Mix([JPEGCompressibility(), functions("contrast")], [1.0, 1.0]),
        Plain(brightness),
    ):
        with pytest.raises(RewardError, match="expected a differentiable reward, which this is not"):
            score(reward, batch(images), grad=True)
    with pytest.raises(RewardError, match="scores without a graph"):
        score(functions("rough"), batch(images), grad=True)
    with pytest.raises(RewardError, match="expected a tensor with a graph"):
        score(functions("bare"), batch(images), grad=True)


def test_without_grad_there_is_no_graph(functions) -> None:
    images = IMAGES.float().requires_grad_()
    output = score(Mix([functions("contrast")], [1.0]), batch(images))
    assert not output.scores.requires_grad and output.scores.dtype == torch.float32
