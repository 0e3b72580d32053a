"""Image rewards on videos: which frames are seen, how their scores become one, and what follows the video to its frames."""

from dataclasses import replace

import pytest
import torch

from rewards import OCR, GroupDiversity, Line, OnFrames, RewardBatch, RewardError, RewardOutput, RewardSpec, score
from tests.helpers.plain_rewards import Plain
from tests.helpers.reward_parts import in_parts

LEVELS = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.2, 0.2, 0.2, 0.8]])


def level(b):
    """Scores the brightness."""
    scores = b.images.mean((1, 2, 3))
    return RewardOutput(
        scores, torch.ones(len(b)).bool(), {"twice": 2 * scores}, [f"saw {x:.1f}" for x in scores.tolist()]
    )


def bright(**options):
    return Plain(level, RewardSpec(differentiable=True, range=(0, 1), **options))


def batch(levels=LEVELS, fps=8.0):
    videos = levels[:, :, None, None, None].expand(*levels.shape, 3, 2, 2)
    return RewardBatch(prompts=[f"p{i}" for i in range(len(levels))], videos=videos, fps=fps)


@pytest.mark.parametrize(
    ("options", "count", "fps", "seen"),
    [
        ({}, 4, 8.0, [0, 1, 2, 3]),
        ({"frames": "first"}, 4, 8.0, [0]),
        ({"frames": "last"}, 4, 8.0, [3]),
        ({"frames": "first_last"}, 4, 8.0, [0, 3]),
        ({"frames": "first_last"}, 1, 8.0, [0]),
        ({"frames": 1}, 5, 8.0, [2]),
        ({"frames": 3}, 9, 8.0, [0, 4, 8]),
        ({"frames": 8}, 8, 8.0, list(range(8))),
        ({"every": 4}, 9, 8.0, [0, 4, 8]),
        ({"per_second": 1.0}, 17, 8.0, [0, 8, 16]),
        ({"per_second": 1.0}, 16, 8.0, [0, 8]),  # the last frame is at 1.875 s
        ({"per_second": 1.0}, 17, 16.0, [0, 16]),  # the same frames at twice the rate
        ({"per_second": 2.0}, 9, 5.0, [0, 2, 5, 8]),
        ({"per_second": 8.0}, 3, 8.0, [0, 1, 2]),
    ],
)
def test_which_frames_are_seen(options, count, fps, seen):
    assert OnFrames(bright(), **options).seen(count, fps) == seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.45, 0.35]),
        ({"reduce": "min"}, [0.1, 0.2]),
        ({"reduce": "max"}, [0.9, 0.8]),
        ({"reduce": "top", "share": 0.5}, [0.7, 0.5]),
        ({"reduce": "top", "share": 0.3}, [0.9, 0.8]),  # at least one
        ({"reduce": "mean_positive"}, [0.45, 0.35]),
        ({"frames": "first_last", "reduce": "min"}, [0.1, 0.2]),
        ({"frames": "last"}, [0.3, 0.8]),
    ],
)
def test_scores_of_frames_become_one(options, expected):
    output = score(OnFrames(bright(), **options), batch())
    assert output.scores[:, 0].tolist() == pytest.approx(expected)
    assert output.info[0].startswith("frame ") and output.info[0].endswith(("saw 0.1", "saw 0.3"))


def test_components_are_means_and_uncertainty_is_a_bound():
    def unsure(b):
        scores = b.images.mean((1, 2, 3))
        return RewardOutput(scores, torch.ones(len(b)).bool(), uncertainty=scores)

    assert score(OnFrames(bright()), batch()).components["twice"].tolist() == pytest.approx([0.9, 0.7])
    assert score(OnFrames(Plain(unsure)), batch()).uncertainty[:, 0].tolist() == pytest.approx([0.45, 0.35])
    assert score(OnFrames(Plain(unsure), reduce="min"), batch()).uncertainty[:, 0].tolist() == pytest.approx([0.9, 0.8])


def test_a_frame_without_a_score_leaves_its_video_without_one():
    def picky(b):
        scores = b.images.mean((1, 2, 3))
        return RewardOutput(scores, scores < 0.85)

    output = score(OnFrames(Plain(picky)), batch())
    assert output.valid[:, 0].tolist() == [False, True] and output.scores[1].item() == pytest.approx(0.35)
    assert score(OnFrames(Plain(picky), reduce="mean_positive"), batch()).valid[:, 0].tolist() == [False, True]
    assert bool(score(OnFrames(Plain(picky), frames="first_last"), batch()).valid.all())


def test_mean_positive_is_zero_where_no_frame_is_above_it():
    shifted = Plain(
        lambda b: RewardOutput(b.images.mean((1, 2, 3)) - 0.5, torch.ones(len(b)).bool()), RewardSpec(range=(-1, 1))
    )
    levels = torch.tensor([[0.1, 0.2, 0.5], [0.1, 0.6, 0.8]])
    reward = OnFrames(shifted, reduce="mean_positive")
    assert score(reward, batch(levels)).scores[:, 0].tolist() == pytest.approx([0, 0.2])
    assert reward.spec.range == (0, 1)


def test_frames_know_what_their_video_knows():
    seen = []
    spy = Plain(lambda b: (seen.append(b), level(b))[1])
    source = torch.rand(3, 2, 2)
    given = RewardBatch(
        prompts=["a", "b"], videos=torch.rand(2, 3, 3, 2, 2), fps=4.0, metadata=[{"k": 1}, {"k": 2}], sample_ids=[7, 9],
        group_ids=[5, 5], conditions=[[source], []],
    )  # fmt: skip
    score(OnFrames(spy, frames="first_last"), given)
    (stills,) = seen
    assert stills.prompts == ["a", "a", "b", "b"] and [row["k"] for row in stills.metadata] == [1, 1, 2, 2]
    assert stills.sample_ids == [7, 7, 9, 9] and stills.group_ids == [5] * 4 and stills.videos is None
    assert [len(images) for images in stills.conditions] == [1, 1, 0, 0]
    assert torch.equal(stills.images, given.videos[:, [0, 2]].flatten(0, 1))


def test_a_groupwise_reward_compares_frames_of_one_time():
    """Not a frame with the others of its own video."""
    levels = torch.tensor([[0.1, 0.9], [0.3, 0.5], [0.4, 0.4], [0.8, 0.4]])
    films = replace(batch(levels), group_ids=[7, 7, 8, 8])
    output = score(OnFrames(GroupDiversity()), films)
    torch.testing.assert_close(
        output.scores[:, 0], torch.tensor([0.3, 0.3, 0.2, 0.2])
    )  # mean of |0.1 − 0.3|, |0.9 − 0.5|
    assert OnFrames(GroupDiversity()).spec.groupwise


def test_several_channels_and_the_spec():
    two = Plain(
        lambda b: RewardOutput(
            torch.stack([b.images.amax((1, 2, 3)), -b.images.amin((1, 2, 3))], 1), torch.ones(len(b), 2).bool()
        ),
        RewardSpec(channels=("high", "low")),
    )
    reward = OnFrames(two, reduce="max")
    output = score(reward, batch())
    torch.testing.assert_close(output.scores, torch.tensor([[0.9, -0.1], [0.8, -0.2]]))
    assert reward.spec.inputs == ("videos",) and reward.spec.channels == ("high", "low")


@pytest.mark.parametrize("reduce", ["mean", "min", "max", "top", "mean_positive"])
def test_gradients_equal_finite_differences(reduce):
    cube = Plain(
        lambda b: RewardOutput((b.images**3).mean((1, 2, 3)), torch.ones(len(b)).bool()),
        RewardSpec(differentiable=True),
    )
    videos = torch.rand(2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def total(pixels):
        given = RewardBatch(prompts=["p", "q"], videos=pixels, fps=8.0)
        return score(OnFrames(cube, reduce=reduce, share=0.5), given, grad=True).scores.sum()

    leaf = videos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    along = torch.randn(videos.shape, dtype=videos.dtype, generator=torch.Generator().manual_seed(1))
    slope = (total(videos + 1e-6 * along) - total(videos - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-6, atol=1e-9)


def test_batch_mates_do_not_matter():
    reward, whole = OnFrames(bright(), reduce="top"), score(OnFrames(bright(), reduce="top"), batch()).scores
    assert torch.equal(torch.cat([score(reward, part).scores for part in in_parts(batch())]), whole)
    assert torch.equal(score(reward, batch().select([1, 0])).scores, whole[[1, 0]])
    assert score(reward, batch().select([])).scores.shape == (0, 1)


class Reader:
    """Reads HELLO in a bright picture, nothing in a dark one."""

    def read(self, images, alphabet):
        return [[Line("HELLO", 0.9)] if image.mean() > 127 else [] for image in images]

    def load(self): ...

    def close(self): ...


@pytest.mark.parametrize(
    ("levels", "mean", "positive", "least"),
    [([1.0, 1, 1, 1], 1.0, 1.0, 1.0), ([0.0, 1, 0, 0], 0.25, 1.0, 0.0), ([0.0] * 4, 0.0, 0.0, 0.0)],
)
def test_ocr_of_videos(levels, mean, positive, least):
    """A text that is shown once: only the mean over positive frames takes it for one that is always shown."""
    videos = torch.tensor(levels)[None, :, None, None, None].expand(1, 4, 3, 4, 4)
    given = RewardBatch(prompts=["p"], videos=videos, fps=8.0, metadata=[{"target": "Hello"}])
    for reduce, expected in (("mean", mean), ("mean_positive", positive), ("min", least)):
        assert score(OnFrames(OCR(recognizer=Reader()), reduce=reduce), given).scores.item() == expected
    lacking = RewardBatch(prompts=["p"], videos=videos, fps=8.0)
    assert "frame 0: no target" in score(OnFrames(OCR(recognizer=Reader())), lacking, max_fail_rate=1).info[0]


@pytest.mark.parametrize(
    "options",
    [
        {"frames": "middle"}, {"frames": 0}, {"every": 0}, {"every": 2, "frames": "first"}, {"per_second": 0.0},
        {"per_second": 1.0, "frames": 4}, {"per_second": 1.0, "every": 2}, {"reduce": "median"}, {"reduce": "top", "share": 0.0},
    ],
)  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(ValueError, match="expected"):
        OnFrames(bright(), **options)


def test_what_is_no_image_reward_and_what_is_too_short():
    with pytest.raises(ValueError, match="expected a reward of images"):
        OnFrames(Plain(level, RewardSpec(inputs=("videos",))))
    with pytest.raises(RewardError, match=r"frames=5 and videos of 4 frames"):
        score(OnFrames(bright(), frames=5), batch())
    with pytest.raises(RewardError, match=r"per_second=9 and videos of 8 fps"):
        score(OnFrames(bright(), per_second=9.0), batch())
