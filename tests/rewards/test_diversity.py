"""Diversity within a group: distances by hand, repeats, and images that are alone."""

import math

import pytest
import torch

from rewards import GroupDiversity, RewardBatch, score
from rewards.diversity import group_distances


def batch(levels, groups):
    images = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)
    return RewardBatch(prompts=["p"] * len(levels), images=images, group_ids=groups)


def test_distances_to_the_others_of_the_group():
    output = score(GroupDiversity(), batch([0.1, 0.5, 0.2, 0.6, 0.4, 0.6], [7, 3, 7, 3, 7, 3]))
    distance, repeated = output.scores.T.tolist()
    assert distance == pytest.approx([0.2, 0.1, 0.15, 0.05, 0.25, 0.05])
    assert repeated == [0, 0, 0, 0.5, 0, 0.5] and bool(output.valid.all())


def test_a_collapsed_group_and_the_limit_of_a_repeat():
    same = score(GroupDiversity(), batch([0.3] * 4, [0] * 4)).scores
    assert same[:, 0].abs().max() < 1e-6 and same[:, 1].tolist() == [1, 1, 1, 1]
    pair = batch([0.3, 0.31], [0, 0])
    assert score(GroupDiversity(near=0.011), pair).scores[:, 1].tolist() == [1, 1]
    assert score(GroupDiversity(near=0.009), pair).scores[:, 1].tolist() == [0, 0]


def test_an_image_alone_in_its_group_has_no_score():
    output = score(GroupDiversity(), batch([0.1, 0.5, 0.2, 0.6, 0.9], [0, 1, 0, 1, 2]))
    assert output.valid.all(1).tolist() == [True, True, True, True, False]
    assert output.info[4] == "it is alone in its group"


def test_features_of_ones_own():
    class Angle:
        """Unit vectors: the distance is √(2 − 2 cos)."""

        def embed(self, images):
            angle = images.mean((1, 2, 3)) * math.pi
            return torch.stack([angle.cos(), angle.sin()], 1)

        def load(self): ...

        def close(self): ...

    output = score(GroupDiversity(features=Angle()), batch([0.0, 0.5], [0, 0]))
    assert output.scores[:, 0].tolist() == pytest.approx([math.sqrt(2)] * 2)


def test_group_distances_pass_gradients_and_take_nothing():
    features = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: group_distances(x, [0, 0, 1, 1]).nan_to_num(0), features)
    assert group_distances(torch.zeros(0, 3), []).shape == (0, 0)
    assert group_distances(torch.zeros(2, 3), [0, 1]).isnan().all()


def test_wrong_options():
    with pytest.raises(ValueError, match=r"got near=0\.0; expected a distance above 0"):
        GroupDiversity(near=0.0)
