"""The guard: failures are errors or masked samples, never numbers. And the laws of batches."""

import time

import pytest
import torch

from rewards import JPEGIncompressibility, RewardBatch, RewardError, RewardOutput, score
from tests.helpers.plain_rewards import Plain, batch_of, brightness, fixed


def test_good_answer_passes_unchanged():
    batch = batch_of(3)
    output = score(Plain(brightness), batch)
    assert torch.equal(output.scores[:, 0], batch.images.mean(dim=(1, 2, 3)))
    assert output.valid.all() and output.elapsed > 0
    assert torch.equal(output.components["red"], batch.images[:, 0].mean(dim=(1, 2)))


def test_elapsed_is_the_wall_time():
    def slow(batch):
        time.sleep(0.05)
        return brightness(batch)

    assert 0.05 <= score(Plain(slow), batch_of(1)).elapsed < 30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_score_is_masked_alone(bad):
    output = score(fixed([0.25, bad, 0.5], part=[1.0, 2.0, 3.0]), batch_of(3))
    assert output.valid[:, 0].tolist() == [True, False, True]
    assert output.scores[[0, 2], 0].tolist() == [0.25, 0.5]
    assert output.scores[1].isnan() and output.components["part"][1].isnan()
    assert output.components["part"][2] == 3


def test_invalid_sample_keeps_no_number():
    output = score(fixed([0.25, 0.0], valid=[True, False]), batch_of(2))
    assert output.scores[0] == 0.25 and output.scores[1].isnan()


def test_broken_image_is_not_shown_and_only_it_is_masked():
    batch = batch_of(4)
    batch.images[2, 0, 0, 0] = torch.nan
    reward = Plain(brightness)
    output = score(reward, batch)
    assert len(reward.seen[0]) == 3 and reward.seen[0].prompts == ["p0", "p1", "p3"]
    assert output.valid[:, 0].tolist() == [True, True, False, True]
    assert torch.equal(output.scores[[0, 1, 3], 0], batch.images[[0, 1, 3]].mean(dim=(1, 2, 3)))
    assert output.scores[2].isnan() and output.components["red"][2].isnan()
    assert "not finite" in output.info[2]


def test_all_images_broken_is_an_error_without_asking():
    reward = Plain(brightness)
    batch = RewardBatch(prompts=["a"], images=torch.full((1, 3, 4, 4), torch.nan))
    with pytest.raises(RewardError, match="not finite"):
        score(reward, batch)
    assert reward.seen == []


def test_exception_names_the_reward():
    def fail(batch):
        raise KeyError("weights")

    with pytest.raises(RewardError, match=r"reward 'plain' failed on 2 samples: KeyError: 'weights'") as caught:
        score(Plain(fail), batch_of(2))
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_a_reward_changes_in_its_batch_stays_there():
    metadata, image = {"words": ["a"], "box": {"x": 1}}, torch.zeros(3, 4, 4)
    batch = RewardBatch(
        prompts=["p"], images=torch.rand(1, 3, 4, 4), metadata=[metadata], sample_ids=[7], group_ids=[5]
    )

    def change(own):
        own.prompts[0] = "q"
        own.metadata[0]["words"].append("b")
        own.metadata[0]["box"]["x"] = 2
        own.sample_ids[0] = own.group_ids[0] = 0
        return fixed([1.0]).answer(own)

    score(Plain(change), batch)
    assert metadata == {"words": ["a"], "box": {"x": 1}}
    assert (batch.prompts, batch.sample_ids, batch.group_ids) == (["p"], [7], [5])

    def paint(own):
        own.conditions[0][0].add_(1)
        return fixed([1.0]).answer(own)

    with pytest.raises(RewardError, match="wrote into the conditions of its batch"):
        score(Plain(paint), RewardBatch(prompts=["p"], images=torch.rand(1, 3, 4, 4), conditions=[[image]]))


def test_no_gradients():
    batch = RewardBatch(prompts=["a"], images=torch.rand(1, 3, 4, 4, requires_grad=True))
    output = score(Plain(brightness), batch)
    assert not output.scores.requires_grad and not output.components["red"].requires_grad


ok = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RewardOutput(torch.zeros(3), torch.ones(3, dtype=torch.bool)), r"scores has shape \[3\]"),
        (RewardOutput(torch.zeros(2, 2), ok), r"scores has shape \[2, 2\]"),
        (RewardOutput(torch.zeros(2, dtype=torch.int64), ok), "scores is torch.int64; expected torch.float32"),
        (RewardOutput(torch.zeros(2, dtype=torch.float64), ok), "scores is torch.float64"),
        (RewardOutput([0.0, 1.0], ok), "scores is list"),
        (RewardOutput(torch.zeros(2), torch.ones(2)), "valid is torch.float32; expected torch.bool"),
        (RewardOutput(torch.zeros(2), ok[:1]), r"valid has shape \[1\]"),
        (RewardOutput(torch.zeros(2), ok, {"part": torch.zeros(1)}), r"components\['part'\] has shape"),
        (RewardOutput(torch.zeros(2), ok, {}, ["one"]), "info has 1 entries"),
        (torch.zeros(2), "got Tensor from"),
        (None, "got NoneType from"),
    ],
)
def test_answer_of_wrong_form_is_an_error(answer, message):
    with pytest.raises(RewardError, match=message):
        score(Plain(lambda batch: answer), batch_of(2))


def test_fail_rate():
    half = fixed([0.5, torch.nan, 0.5, torch.nan])
    assert score(half, batch_of(4)).valid.sum() == 2  # exactly half is allowed
    with pytest.raises(RewardError, match=r"2 of 4 samples have no score.*sample 1 \(prompt 'p1'\)"):
        score(half, batch_of(4), max_fail_rate=0.49)
    with pytest.raises(RewardError, match="3 of 4"):
        score(fixed([torch.nan, torch.nan, 0.5, torch.nan]), batch_of(4))


def test_empty_batch():
    output = score(JPEGIncompressibility(), RewardBatch(prompts=[], images=torch.zeros(0, 3, 8, 8)))
    assert output.scores.shape == output.valid.shape == (0, 1)
    assert JPEGIncompressibility()(RewardBatch(prompts=[], images=torch.zeros(0, 3, 8, 8))).scores.shape == (0,)


def test_batch_fields_must_agree():
    with pytest.raises(ValueError, match="'images': 3"):
        RewardBatch(prompts=["a"], images=torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match="'metadata': 2"):
        RewardBatch(prompts=["a"], metadata=[{}, {}])
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        RewardBatch(prompts=["a"], images=torch.zeros(1, 4, 4, 3))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        RewardBatch(prompts=["a"], images=torch.zeros(1, 3, 4, 4, dtype=torch.int64))


def test_select_keeps_rows_together():
    batch = batch_of(5)
    batch.metadata[3]["target"] = "D"
    picked = batch.select([3, 1, 3])
    assert picked.prompts == ["p3", "p1", "p3"] and picked.sample_ids == [3, 1, 3] and picked.group_ids == [3, 1, 3]
    assert picked.metadata[0]["target"] == "D" and torch.equal(picked.images, batch.images[[3, 1, 3]])
    mask = torch.tensor([True, False, False, True, False])
    assert batch.select(mask).sample_ids == [0, 3]
    assert len(batch.select([])) == 0


def test_pixels_round_and_refuse_other_ranges():
    values = torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 1.0])
    batch = RewardBatch(prompts=["a"], images=values.expand(1, 3, 1, 5))
    assert batch.pixels()[0, 0, 0].tolist() == [0, 0, 1, 255, 255]
    with pytest.raises(ValueError, match=r"got images in -1\.\.1; expected"):
        RewardBatch(prompts=["a"], images=torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2)).pixels()
    with pytest.raises(ValueError, match="expected images, which this reward needs"):
        RewardBatch(prompts=["a"]).pixels()


def test_every_uint8_value_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    assert torch.equal(RewardBatch(prompts=["a"], images=levels).pixels(), levels)
