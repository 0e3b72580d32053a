"""Statistics of videos: closed forms, frame rates, and a still that no longer wins."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from rewards import Gated, MotionBand, RewardBatch, RewardError, Thumbnail, VideoStatistics, score
from tests.helpers.reward_parts import in_parts


def video(levels, fps=8.0, size=4):
    """One video of even frames."""
    frames = torch.as_tensor(levels, dtype=torch.float32)[None, :, None, None, None].expand(1, -1, 3, size, size)
    return RewardBatch(prompts=["p"], videos=frames, fps=fps)


def measured(batch, **options):
    output = score(VideoStatistics(**options), batch, max_fail_rate=1)
    return dict(zip(output.channels, output.scores[0].tolist(), strict=True))


def test_even_change():
    found = measured(video([0.1, 0.15, 0.2, 0.25, 0.3]))
    first = 1 - sum((0.05 * t) ** 2 / 2 for t in range(1, 5)) / 4
    expected = {"motion": 0.4, "flicker": 0, "consistency": 1 - 0.05**2 / 2, "first_frame": first, "static": 0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_film_has_one_motion_at_any_frame_rate():
    ramp = torch.linspace(0.1, 0.9, 17)
    fine, coarse = measured(video(ramp, 16.0)), measured(video(ramp[::4], 4.0))
    assert fine["motion"] == pytest.approx(coarse["motion"]) == pytest.approx(0.8)
    assert measured(video(ramp, 8.0))["motion"] == pytest.approx(0.4)  # the same frames, played at half the speed


def test_flicker():
    found = measured(video([0.2, 0.5, 0.2, 0.5, 0.2]))
    assert found["flicker"] == pytest.approx(0.3) and found["motion"] == pytest.approx(0.3 * 8)
    assert measured(video([0.2, 0.2, 0.5, 0.2, 0.2]))["flicker"] == pytest.approx((0.15 + 0.3 + 0.15) / 3)
    noise = 0.5 + 0.1 * torch.randn(1, 9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fine = measured(RewardBatch(prompts=["p"], videos=noise.clamp(0, 1), fps=8.0))["flicker"]
    assert fine < 0.03  # grain is averaged away: of single pixels it is 0.1 · √1.5 · √(2/π) = 0.098


def test_a_still_is_caught():
    still = measured(video([0.4] * 5))
    assert still == {"motion": 0, "flicker": 0, "consistency": 1, "first_frame": 1, "static": 1}
    moving = video([0.1, 0.15, 0.2, 0.25, 0.3])
    consistency = VideoStatistics(("consistency",), name="consistency")
    assert score(consistency, video([0.4] * 5)).scores > score(consistency, moving).scores  # alone, a still wins
    gated = Gated(consistency, VideoStatistics(("motion",)), threshold=0.2, otherwise=0.0)
    assert score(gated, video([0.4] * 5)).scores.item() == 0
    assert score(gated, moving).scores.item() == pytest.approx(1 - 0.05**2 / 2)
    assert measured(video([0.4, 0.4, 0.4, 0.6]))["static"] == pytest.approx(2 / 3)
    assert (
        measured(video([0.4, 0.4 + 0.9 / 255]))["static"] == 1
        and measured(video([0.4, 0.4 + 1.1 / 255]))["static"] == 0
    )


@pytest.mark.parametrize(("step", "expected"), [(0.0, 0.0), (0.0125, 0.5), (0.025, 1.0), (0.1, 1.0), (0.2, 0.5)])
def test_motion_band(step, expected):
    output = score(MotionBand(low=0.2, high=0.8), video([0.1, 0.1 + step, 0.1 + 2 * step]))
    assert output.scores.item() == pytest.approx(expected, abs=1e-5)
    assert output.components["motion_per_second"].item() == pytest.approx(8 * step, abs=1e-6)


def test_a_video_too_short_has_no_score():
    one = score(VideoStatistics(), video([0.5]), max_fail_rate=1)
    assert not bool(one.valid.any()) and one.info == ["a video of 1 frame; expected at least 2, for flicker 3"]
    two = score(VideoStatistics(), video([0.5, 0.6]), max_fail_rate=1)
    assert two.valid[0].tolist() == [True, False, True, True, True]
    assert not bool(score(MotionBand(0.1, 1.0), video([0.5]), max_fail_rate=1).valid)


def test_of_unit_vectors_consistency_is_the_cosine():
    class Direction:
        def embed(self, images):
            return normalize(images.mean((2, 3)), dim=1)

        def load(self): ...

        def close(self): ...

    frames = torch.rand(1, 3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = measured(RewardBatch(prompts=["p"], videos=frames, fps=8.0), features=Direction())
    a, b, c = frames.mean((3, 4))[0]
    cosine = torch.nn.functional.cosine_similarity
    assert found["consistency"] == pytest.approx(float(cosine(a, b, 0) + cosine(b, c, 0)) / 2, abs=1e-6)
    assert found["first_frame"] == pytest.approx(float(cosine(a, b, 0) + cosine(a, c, 0)) / 2, abs=1e-6)


def test_the_distance_of_thumbnails_is_the_root_mean_square_of_what_is_left():
    a, b = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    areas = (a - b).reshape(3, 2, 2, 2, 4).mean((2, 4))
    for size, left in ((8, a - b), (2, areas)):
        distance = Thumbnail(size).embed(torch.stack([a, b])).diff(dim=0).norm()
        torch.testing.assert_close(distance, left.square().mean().sqrt())


@pytest.mark.parametrize(
    "made", [VideoStatistics(("motion", "flicker", "consistency", "first_frame")), MotionBand(0.1, 1.5)]
)
def test_gradients(made):
    def total(pixels):
        return score(made, RewardBatch(prompts=["p"] * 2, videos=pixels, fps=8.0), grad=True).scores.sum()

    videos = torch.rand(2, 4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaf = videos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    along = torch.randn(videos.shape, dtype=videos.dtype, generator=torch.Generator().manual_seed(4))
    slope = (total(videos + 1e-6 * along) - total(videos - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-6, atol=1e-8)
    still = torch.full_like(videos, 0.5).requires_grad_()
    assert bool(torch.autograd.grad(total(still), still)[0].isfinite().all())


def test_batch_mates_do_not_matter():
    videos = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    batch = RewardBatch(prompts=["p"] * 3, videos=videos, fps=8.0)
    for made in (VideoStatistics(), MotionBand(0.1, 1.0)):
        alone = torch.cat([score(made, part).scores for part in in_parts(batch)])
        torch.testing.assert_close(alone, score(made, batch).scores)


def test_wrong_options():
    for statistics in ((), ("speed",)):
        with pytest.raises(ValueError, match="expected some of"):
            VideoStatistics(statistics)
    for low, high in ((0.0, 1.0), (1.0, 1.0), (0.1, math.inf)):
        with pytest.raises(ValueError, match="expected 0 < low < high"):
            MotionBand(low, high)
    with pytest.raises(RewardError, match="expected videos, which it reads"):
        score(MotionBand(0.1, 1.0), RewardBatch(prompts=["p"], images=torch.zeros(1, 3, 4, 4)))
