"""JPEG rewards: order, units, and the laws of batches."""

import io

import pytest
import torch
from PIL import Image

from rewards import JPEGCompressibility, JPEGIncompressibility, RewardBatch, score
from tests.helpers.reward_parts import in_parts


def pictures():
    """flat, a ramp, noise."""
    ramp = torch.linspace(0, 1, 32).expand(3, 32, 32)
    return torch.stack(
        [torch.full((3, 32, 32), 0.3), ramp, torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))]
    )


def batch_of(images):
    return RewardBatch(prompts=["p"] * len(images), images=images)


def test_flat_is_smallest_and_noise_largest():
    sizes = score(JPEGIncompressibility(), batch_of(pictures())).scores
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_kilobytes_are_those_of_the_file():
    levels = (pictures()[2] * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=95)
    output = score(JPEGIncompressibility(), batch_of(pictures()[2:]))
    assert output.scores.item() == pytest.approx(len(file.getvalue()) / 1000)
    assert torch.equal(output.components["kilobytes"], output.scores[:, 0])


def test_compressibility_is_the_negative_and_divides():
    sizes = score(JPEGIncompressibility(), batch_of(pictures())).scores
    assert torch.equal(score(JPEGCompressibility(), batch_of(pictures())).scores, -sizes)
    divided = score(JPEGCompressibility(divide_by=500), batch_of(pictures()))
    assert torch.allclose(divided.scores, -sizes / 500) and torch.equal(divided.components["kilobytes"], sizes[:, 0])
    with pytest.raises(ValueError, match="a number above 0"):
        JPEGCompressibility(divide_by=0)


def test_lower_quality_is_smaller():
    sizes = [score(JPEGIncompressibility(quality=q), batch_of(pictures()[2:])).scores.item() for q in (30, 95)]
    assert sizes[0] < sizes[1]


def test_float_and_uint8_agree_and_order_is_free():
    levels = (pictures() * 255).round().to(torch.uint8)
    reward = JPEGIncompressibility()
    whole = score(reward, batch_of(levels)).scores
    assert torch.equal(score(reward, batch_of(levels / 255)).scores, whole)
    assert torch.equal(score(reward, batch_of(levels[[2, 0, 1]])).scores, whole[[2, 0, 1]])
    assert torch.equal(torch.cat([score(reward, part).scores for part in in_parts(batch_of(levels), 2)]), whole)
