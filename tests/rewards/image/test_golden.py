"""Published numbers of the published weights, where those are in the hub's cache."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import CLIPScore, HPSv2, ImageReward, PickScore, RewardBatch, score
from rewards.image.clip import load_clip

pytestmark = pytest.mark.slow
FILES = {  # what a reward loads from the hub
    "clip_score": [("openai/clip-vit-large-patch14", "model.safetensors")],
    "pick_score": [("yuvalkirstain/PickScore_v1", "model.safetensors")],
    "hps_v2.0": [("xswu/HPSv2", "HPS_v2_compressed.pt")],
    "hps_v2.1": [("xswu/HPSv2", "HPS_v2.1_compressed.pt")],
    "image_reward": [("THUDM/ImageReward", "ImageReward.pt"), ("bert-base-uncased", "vocab.txt")],
}
MAKERS: dict[str, Callable[[], Any]] = {
    "clip_score": CLIPScore,
    "pick_score": PickScore,
    "hps_v2.0": lambda: HPSv2("v2.0"),
    "hps_v2.1": HPSv2,
    "image_reward": ImageReward,
}
IMAGES = "IMAGEREWARD_IMAGES"  # the folder assets/images of github.com/THUDM/ImageReward


def need(name: str) -> None:
    from huggingface_hub import try_to_load_from_cache

    for repository, file in FILES[name]:
        if not isinstance(try_to_load_from_cache(repository, file), str):
            pytest.skip(f"{file} of {repository} is not in the cache of the hub")


@pytest.mark.parametrize("name", MAKERS)
def test_the_published_file_fits_tensor_by_tensor(name: str) -> None:
    need(name)
    reward = MAKERS[name]()
    reward.load()
    assert bool(score(reward, RewardBatch(prompts=["a cat"], images=torch.rand(1, 3, 64, 64))).valid.all())


def test_the_logit_scale_of_pick_score_is_saturated() -> None:
    need("pick_score")
    assert load_clip(PickScore().model, None, torch.float32).scale == pytest.approx(100, rel=0.01)


def test_image_reward_gives_the_numbers_of_its_readme() -> None:
    need("image_reward")
    if IMAGES not in os.environ:
        pytest.skip(f"${IMAGES} does not name the folder assets/images of github.com/THUDM/ImageReward")
    prompt, scores = "a painting of an ocean with clouds and birds, day time, low depth field effect", []
    for number in range(1, 5):
        picture = np.asarray(Image.open(Path(os.environ[IMAGES]) / f"{number}.webp").convert("RGB"))
        batch = RewardBatch(prompts=[prompt], images=torch.tensor(picture).permute(2, 0, 1)[None])
        scores.append(float(score(ImageReward(preprocess="pil"), batch).scores))
    assert scores == pytest.approx([0.58, 0.27, -1.41, -2.03], abs=0.02)
