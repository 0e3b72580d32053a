"""Statistics of pictures: closed forms, bounds, gradients."""

import math
from typing import get_args

import pytest
import torch

from rewards import ImageStatistics, RewardBatch, RewardError, score
from rewards.monitors import STATISTICS, Statistic
from tests.helpers.reward_parts import in_parts

SMOOTH = tuple(name for name in STATISTICS if STATISTICS[name].differentiable)


def measured(image):
    output = score(ImageStatistics(), RewardBatch(prompts=["p"], images=image[None]))
    return dict(zip(output.channels, output.scores[0].tolist(), strict=True))


def plane(*color, height=8, width=8):
    return torch.tensor(color)[:, None, None].expand(3, height, width).clone()


def gray(y):
    return y.expand(3, *y.shape)


def test_one_color():
    found = measured(plane(0.8, 0.4, 0.2))
    luma = 0.2126 * 0.8 + 0.7152 * 0.4 + 0.0722 * 0.2
    expected = {"brightness": luma, "saturation": 0.75, "colorfulness": 0.3 * math.hypot(0.4, 0.4), "flat": 1.0}
    assert found == pytest.approx(dict.fromkeys(STATISTICS, 0.0) | expected, abs=1e-6)


def test_black_and_white():
    dark = measured(plane(0.0, 0.0, 0.0))
    assert dark == dict.fromkeys(STATISTICS, 0.0) | {"black": 1, "flat": 1}
    assert measured(plane(0.1, 0.1, 0.1))["black"] == 1 and measured(plane(0.11, 0.0, 0.0))["black"] == 0
    light = measured(plane(1.0, 1.0, 1.0))
    assert light["brightness"] == pytest.approx(1) and light["saturation"] == 0 and light["black"] == 0


def test_two_halves():
    image = torch.zeros(8, 10)
    image[:, 5:] = 1
    found = measured(gray(image))
    assert found["brightness"] == pytest.approx(0.5) and found["contrast"] == pytest.approx(0.5)
    assert found["black"] == 0.5 and found["entropy"] == pytest.approx(1)
    assert found["flat"] == pytest.approx(8 / 9)  # of nine columns with a right neighbor, one has another there
    assert found["edges"] == pytest.approx(2 / 8)  # of eight inner columns, two feel the step
    assert found["sharpness"] == pytest.approx(2 / 8)  # the Laplacian is 1 and -1 there: mean 0


def test_a_checkerboard_is_the_sharpest_picture():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    found = measured(gray(board.float()))
    assert found["sharpness"] == pytest.approx(16) and found["high_frequency"] == pytest.approx(1)
    assert found["edges"] == pytest.approx(0, abs=1e-6) and found["flat"] == 0


def test_high_frequency_is_a_share_of_the_power():
    x = torch.arange(32) * 2 * math.pi / 32
    for low, high in ((0.2, 0.0), (0.0, 0.1), (0.2, 0.1)):
        wave = 0.5 + (low * torch.sin(3 * x) + high * torch.cos(12 * x)).expand(32, 32)
        for image in (wave, wave.T):
            share = measured(gray(image))["high_frequency"]
            assert share == pytest.approx(high**2 / (low**2 + high**2), abs=1e-5)


def test_colors():
    image = plane(1.0, 0.0, 0.0)
    image[:, :, 4:] = plane(0.0, 1.0, 0.0)[:, :, 4:]
    found = measured(image)  # rg is 1 and -1, yb is 1/2 everywhere
    assert found["colorfulness"] == pytest.approx(1 + 0.3 * 0.5) and found["saturation"] == 1
    image[:, 4:, :4], image[:, 4:, 4:] = plane(0.0, 0.0, 1.0)[:, 4:, :4], plane(1.0, 1.0, 1.0)[:, 4:, 4:]
    assert measured(image)["entropy"] == pytest.approx(2)


def test_edges_know_no_direction():
    ramp = (torch.arange(9) / 16).expand(9, 9)
    slope = math.hypot(1 / 16, 1 / 16)
    for image, expected in ((ramp, 2 / 16), (ramp.T, 2 / 16), ((ramp + ramp.T), 2 * slope)):
        assert measured(gray(image))["edges"] == pytest.approx(expected)


def test_all_keep_to_their_bounds_whatever_the_picture():
    images = torch.rand(16, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images, images.round(), images**8])
    scores = score(ImageStatistics(), RewardBatch(prompts=["p"] * 48, images=images)).scores
    most = torch.tensor([each.most for each in STATISTICS.values()])
    assert bool((scores >= 0).all()) and bool((scores <= most + 1e-5).all())
    assert set(get_args(Statistic)) == set(STATISTICS)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name):
    def total(pixels):
        return score(ImageStatistics((name,)), RewardBatch(prompts=["p"] * 2, images=pixels), grad=True).scores.sum()

    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    along = torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(2))
    slope = (total(images + 1e-6 * along) - total(images - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-6, atol=1e-8)
    for even in (torch.zeros_like(images), torch.full_like(images, 0.5)):
        even.requires_grad_()
        (gradient,) = torch.autograd.grad(total(even), even)
        assert bool(gradient.isfinite().all())


def test_some_of_them_and_batch_mates():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = RewardBatch(prompts=["p"] * 4, images=images)
    some, every = ImageStatistics(("edges", "black")), ImageStatistics()
    columns = [list(STATISTICS).index(name) for name in some.statistics]
    assert torch.equal(score(some, batch).scores, score(every, batch).scores[:, columns])
    alone = torch.cat([score(every, part).scores for part in in_parts(batch)])
    torch.testing.assert_close(alone, score(every, batch).scores)
    assert not some.spec.differentiable and some.spec.channels == ("edges", "black")


def test_wrong_options_and_tiny_images():
    for statistics in ((), ("sharp",), ("edges", "edges")):
        with pytest.raises(ValueError, match="expected"):
            ImageStatistics(statistics)
    with pytest.raises(RewardError, match="at least 3 x 3"):
        score(ImageStatistics(), RewardBatch(prompts=["p"], images=torch.zeros(1, 3, 2, 8)))
