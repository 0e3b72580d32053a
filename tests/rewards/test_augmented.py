"""Views of a picture: what they keep, that they are the same everywhere, and what an adversarial texture costs."""

import pytest
import torch

from rewards import Augmented, OnFrames, RewardBatch, RewardOutput, RewardSpec, score
from rewards.augmented import View, changed
from tests.helpers.plain_rewards import Plain, batch_of, brightness
from tests.helpers.reward_parts import in_parts

DIFFERENTIABLE = RewardSpec(differentiable=True, range=(0, 1))


def corner(b):
    return RewardOutput(b.images[:, 0, 0, 0], torch.ones(len(b)).bool(), {"red": b.images[:, 0].mean((1, 2))})


def one(image):
    return RewardBatch(prompts=["p"], images=image[None])


def test_an_even_picture_looks_alike_in_all_views():
    output = score(
        Augmented(Plain(brightness), views=6, crop=0.3, shift=2, flip=True), one(torch.full((3, 16, 16), 0.3))
    )
    assert output.scores.item() == pytest.approx(0.3, abs=1e-6) and output.uncertainty.item() < 1e-6
    assert output.components["drop"].abs().item() < 1e-6


@pytest.mark.parametrize(
    ("view", "shift", "expected"),
    [
        (View(1.0, 0.5, 0.5, False), 1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
        (View(1.0, 0.0, 0.5, False), 1, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (View(1.0, 0.5, 1.0, False), 1, [[1, 2, 3, 3], [5, 6, 7, 7], [9, 10, 11, 11], [13, 14, 15, 15]]),
        (View(1.0, 0.0, 0.0, True), 0, [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8], [15, 14, 13, 12]]),
        (View(0.25, 1.0, 0.0, False), 0, [[12] * 4] * 4),
    ],
)
def test_views_by_hand(view, shift, expected):
    image = torch.arange(16.0).reshape(1, 4, 4).expand(3, 4, 4) / 15
    for pixels in (changed(one(image), view, shift).images[0], changed(
        RewardBatch(prompts=["p"], videos=image[None, None].expand(1, 2, 3, 4, 4), fps=8.0), view, shift
    ).videos[0, 1]):  # fmt: skip
        torch.testing.assert_close(pixels[2] * 15, torch.tensor(expected).float())


def test_score_spread_and_drop_are_those_of_the_views():
    batch = batch_of(3)
    made = Augmented(Plain(corner), views=4, crop=0.0, shift=1)
    seen = torch.stack([b.images[:, 0, 0, 0] for b in [batch] + [changed(batch, view, 1) for view in made.drawn()]], 1)
    output = score(made, batch)
    torch.testing.assert_close(output.scores[:, 0], seen.mean(1))
    torch.testing.assert_close(output.uncertainty[:, 0], seen.std(1, correction=0))
    torch.testing.assert_close(output.components["drop"], seen[:, 0] - seen[:, 1:].mean(1))
    torch.testing.assert_close(output.components["red"], batch.images[:, 0].mean((1, 2)))
    worst = score(Augmented(Plain(corner), views=4, crop=0.0, shift=1, how="wco"), batch).scores[:, 0]
    torch.testing.assert_close(worst, seen.amin(1))


def test_views_are_keyed_by_the_seed_and_the_first_ones_stay():
    few, many = Augmented(Plain(corner), views=3, flip=True), Augmented(Plain(corner), views=9, flip=True)
    assert few.drawn() == many.drawn()[:2] != Augmented(Plain(corner), views=3, flip=True, seed=1).drawn()
    torch.manual_seed(5)
    assert many.drawn() == Augmented(Plain(corner), views=9, flip=True).drawn()
    assert {view.flip for view in many.drawn()} == {True, False}
    assert not any(view.flip for view in Augmented(Plain(corner), views=9).drawn())


def test_batch_mates_do_not_matter():
    made, batch = Augmented(Plain(corner)), batch_of(4)
    alone = torch.cat([score(made, part).scores for part in in_parts(batch)])
    assert torch.equal(alone, score(made, batch).scores)
    assert torch.equal(score(made, batch.select([2, 0])).scores, alone[[2, 0]])


def test_a_score_that_rests_on_single_pixels_falls():
    """The reward counts a checkerboard of period two: a shift by one pixel turns its sign around."""
    sign = torch.ones(16, 16)
    sign[:, 1::2] = -1

    def grid(b):
        return RewardOutput((b.images.mean(1) * sign).mean((1, 2)), torch.ones(len(b)).bool())

    output = score(Augmented(Plain(grid), views=8, crop=0.0, shift=3), one(((sign + 1) / 2).expand(3, 16, 16)))
    assert output.components["drop"].item() > 0.2 and output.scores.item() < 0.4 and output.uncertainty.item() > 0.2


def test_gradients_equal_finite_differences():
    spec = DIFFERENTIABLE
    cube = Plain(lambda b: RewardOutput((b.images**3).mean((1, 2, 3)), torch.ones(len(b)).bool()), spec)
    made = Augmented(cube, views=3, crop=0.3, shift=1, flip=True, how="lcb")
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def total(pixels):
        return score(made, RewardBatch(prompts=["p", "q"], images=pixels), grad=True).scores.sum()

    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    along = torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(0))
    slope = (total(images + 1e-6 * along) - total(images - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-6, atol=1e-9)


def test_videos_and_empty_batches():
    videos = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    made = Augmented(OnFrames(Plain(brightness), reduce="min"), views=3)
    assert score(made, RewardBatch(prompts=["p"] * 2, videos=videos, fps=8.0)).valid.all()
    assert score(Augmented(Plain(brightness)), batch_of(2).select([])).scores.shape == (0, 1)


def test_the_range_is_kept_where_the_rule_keeps_to_it():
    inner = Plain(brightness, DIFFERENTIABLE)
    assert Augmented(inner, how="wco").spec == DIFFERENTIABLE and Augmented(inner, how="uwo").spec.range is None


@pytest.mark.parametrize(
    "options", [{"views": 1}, {"crop": 1.0}, {"shift": -1}, {"crop": 0.0, "shift": 0}, {"how": "median"}, {"coef": 1.0}]
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match="expected"):
        Augmented(Plain(brightness), **options)
    with pytest.raises(ValueError, match="expected images or videos"):
        Augmented(Plain(brightness, RewardSpec(inputs=("latents",))))
