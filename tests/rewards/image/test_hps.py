"""HPSv2 on a tiny network of open_clip in the published file's layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import HPSv2, RewardBatch, score
from tests.helpers import tiny_rewards as tiny

PROMPTS = ["a red cat", 'the word "MOON"']
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def made(**settings: str) -> HPSv2:
    folder = tiny.hps()
    return HPSv2(**{"model": str(folder), "architecture": str(folder / "architecture.json"), **settings})


def scores(reward: HPSv2, images: Tensor) -> Tensor:
    return score(reward, RewardBatch(prompts=PROMPTS, images=images)).scores[:, 0]


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_the_score_is_the_cosine_with_the_whole_image_on_black(version: str) -> None:
    """224 × 168: the long side is 224 already, and the image is padded all the same."""
    import open_clip

    network = open_clip.CLIP(**tiny.open_clip_config())
    name = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[version]
    network.load_state_dict(torch.load(tiny.hps() / name)["state_dict"])
    images = torch.rand(2, 3, 224, 168)
    square = torch.zeros(2, 3, 224, 224)
    square[:, :, :, 28:196] = images
    with torch.no_grad():
        seen, words = network.encode_image((square - MEAN) / STD), network.encode_text(open_clip.tokenize(PROMPTS))
    torch.testing.assert_close(scores(made(version=version), images), F.cosine_similarity(seen, words))


def test_four_channels_are_refused_not_fed() -> None:
    with pytest.raises(ValueError, match=r"got images \[2, 4, 8, 8\]; expected \[N, 3, H, W\]"):
        RewardBatch(prompts=PROMPTS, images=torch.rand(2, 4, 8, 8))


def test_the_published_architecture_is_that_of_open_clip() -> None:
    import open_clip

    config = open_clip.get_model_config(HPSv2().architecture)
    vision, text = config["vision_cfg"], config["text_cfg"]
    assert (vision["width"], vision["layers"], vision["patch_size"], vision["head_width"]) == (1280, 32, 14, 80)
    assert (text["width"], text["layers"], text["heads"], config["embed_dim"]) == (1024, 24, 16, 1024)
    assert not config.get("quick_gelu")


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.hps(), tmp_path / "hps"))
    state = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    state["visual.extra"] = state.pop("visual.proj")
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=r"(?s)not those of a CLIP.*visual.proj.*visual.extra"):
        made(model=str(folder)).load()
    made(model=str(folder / "HPS_v2_compressed.pt")).load()
    wide = tiny.open_clip_config(width=64)
    (folder / "wide.json").write_text(json.dumps(wide))
    with pytest.raises(ValueError, match="size mismatch"):
        made(architecture=str(folder / "wide.json")).load()
    with pytest.raises(ValueError, match="got architecture='ViT-Z'; expected a model of open_clip"):
        made(architecture="ViT-Z").load()
