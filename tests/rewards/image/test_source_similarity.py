"""SourceSimilarity on a tiny CLIP: its formula, sources of other sizes, samples without one."""

from dataclasses import replace

import pytest
import torch

from rewards import RewardBatch, RewardError, SourceSimilarity, score
from rewards.image.clip import load_clip
from tests.helpers import tiny_rewards as tiny

DRAWS = torch.Generator().manual_seed(0)
IMAGES = torch.rand(3, 3, 24, 24, generator=DRAWS)
SOURCES = [torch.rand(3, 24, 24, generator=DRAWS), torch.rand(3, 40, 20, generator=DRAWS), IMAGES[2]]
BATCH = RewardBatch(prompts=["a", "b", "c"], images=IMAGES, conditions=[[source] for source in SOURCES])


def test_it_is_the_cosine_of_the_two_images() -> None:
    clip = load_clip(str(tiny.clip()), None, torch.float32)
    ready = [clip.images(clip.preprocess(each[None], "tensor", False)) for each in (*IMAGES, *SOURCES)]
    expected = torch.nn.functional.cosine_similarity(torch.cat(ready[:3]), torch.cat(ready[3:]))
    found = score(SourceSimilarity(str(tiny.clip()), batch_size=2), BATCH).scores[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float(found[2]) == pytest.approx(1) and float(found[:2].max()) < 0.999


def test_a_sample_without_a_source_has_no_score_and_a_batch_without_any_is_refused() -> None:
    reward = SourceSimilarity(str(tiny.clip()))
    output = score(reward, replace(BATCH, conditions=[[SOURCES[0]], [], [SOURCES[2]]]))
    assert output.valid[:, 0].tolist() == [True, False, True] and output.info[1].startswith("no source image")
    assert not score(reward, replace(BATCH, conditions=[[], [], []]), max_fail_rate=1.0).valid.any()
    with pytest.raises(RewardError, match="got a batch with images; expected conditions"):
        score(reward, replace(BATCH, conditions=None))
