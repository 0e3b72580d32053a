"""Equal samples are scored once; what differs in anything a reward may read is not equal."""

import torch

from rewards import RewardBatch, RewardSpec, score
from rewards.duplicates import first_of_equals
from tests.helpers.plain_rewards import Plain, batch_of, brightness


def test_equal_samples_are_asked_once_and_all_are_answered() -> None:
    batch = batch_of(4).select([0, 1, 0, 2, 1, 3])
    reward = Plain(brightness)
    output = score(reward, batch)
    assert [asked.prompts for asked in reward.seen] == [["p0", "p1", "p2", "p3"]]
    torch.testing.assert_close(output.scores[:, 0], batch.images.mean((1, 2, 3)))
    torch.testing.assert_close(output.components["red"], batch.images[:, 0].mean((1, 2)))


def test_with_gradients_or_in_groups_every_sample_is_asked() -> None:
    batch = batch_of(2).select([0, 1, 0])
    for spec, grad in ((RewardSpec(differentiable=True), True), (RewardSpec(groupwise=True), False)):
        reward = Plain(brightness, spec)
        score(reward, batch, grad=grad)
        assert len(reward.seen[0]) == 3


def test_a_sample_that_is_not_finite_beside_equal_ones() -> None:
    batch = batch_of(2).select([0, 1, 0, 1])
    batch.images[1] = torch.nan
    reward = Plain(brightness)
    output = score(reward, batch)
    assert output.valid[:, 0].tolist() == [True, False, True, True] and len(reward.seen[0]) == 2
    assert output.info[1] == "its input is not finite" and output.scores[0] == output.scores[2]


def test_what_makes_samples_differ() -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    swapped = image.flip(-1)  # the same sum
    sources = [[], [image], [image], [swapped], [image, image]]
    batch = RewardBatch(
        prompts=["a"] * 5, images=torch.stack([image] * 5), conditions=sources, metadata=[{}, {}, {}, {}, {}]
    )
    assert first_of_equals(batch).tolist() == [0, 1, 1, 3, 4]
    told = RewardBatch(
        prompts=["a", "a", "a", "b"], images=torch.stack([image] * 4), metadata=[{"n": 1}, {"n": 2}, {"n": 1}, {"n": 1}]
    )
    assert first_of_equals(told).tolist() == [0, 1, 0, 3]
    pictures = RewardBatch(prompts=["a"] * 3, images=torch.stack([image, swapped, image]))
    assert first_of_equals(pictures).tolist() == [0, 1, 0]
    noisy = RewardBatch(prompts=["a"] * 3, latents=torch.stack([image] * 3), sigma=torch.tensor([0.5, 0.5, 0.6]))
    assert first_of_equals(noisy).tolist() == [0, 0, 2]
    assert first_of_equals(RewardBatch(prompts=["a", "a"])).tolist() == [0, 1]  # nothing but a prompt
