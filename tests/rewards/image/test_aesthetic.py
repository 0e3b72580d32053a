"""Aesthetic on a tiny CLIP and heads of the published layouts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import Aesthetic, RewardBatch, score
from rewards.image.preprocess import Preprocess
from tests.helpers import tiny_rewards as tiny

IMAGES = torch.rand(3, 3, 32, 67, generator=torch.Generator().manual_seed(0))  # an odd number to crop


def made(head: Path, width: int = 768) -> Aesthetic:
    return Aesthetic(str(head), str(tiny.clip(width)))


def scores(reward: Aesthetic) -> Tensor:
    return score(reward, RewardBatch(prompts=["a", "b", "c"], images=IMAGES)).scores[:, 0]


def embeddings(width: int = 768) -> Tensor:
    """Unit rows, by transformers' own call."""
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(tiny.clip(width)).eval()
    pixels = Preprocess(32, crop_offset="floor")(IMAGES)
    with torch.no_grad():
        features = network.visual_projection(network.vision_model(pixels).pooler_output)
    return features / features.norm(dim=1, keepdim=True)


def through(variant: str) -> Tensor:
    """The head by hand, from the file."""
    state, x = torch.load(tiny.aesthetic_head(variant)), embeddings()
    for place in tiny.AESTHETIC[variant]:
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        if variant == "relu" and place != 11:
            x = x.clamp(min=0)
    return x[:, 0]


@pytest.mark.parametrize("variant", ["linear", "relu"])
def test_the_keys_show_which_head_it_is(variant: str) -> None:
    torch.testing.assert_close(scores(made(tiny.aesthetic_head(variant))), through(variant), rtol=1e-4, atol=1e-5)


def test_the_linear_head_is_one_affine_map_whose_gradient_is_the_same_everywhere(tmp_path: Path) -> None:
    state = torch.load(tiny.aesthetic_head("linear"))
    weight, bias = torch.eye(768), torch.zeros(768)
    for place in tiny.AESTHETIC["linear"]:
        weight = state[f"layers.{place}.weight"] @ weight
        bias = state[f"layers.{place}.weight"] @ bias + state[f"layers.{place}.bias"]
    torch.save({"weight": weight, "bias": bias}, tmp_path / "one.pth")
    five = scores(made(tiny.aesthetic_head("linear")))
    torch.testing.assert_close(five, embeddings() @ weight[0] + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(made(tmp_path / "one.pth")), five, rtol=1e-4, atol=1e-4)  # which is v1's layout


@pytest.mark.parametrize("variant", ["linear", "relu"])
def test_a_head_of_zeros_with_a_last_bias_scores_that(tmp_path: Path, variant: str) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in tiny.head_state(tiny.AESTHETIC[variant], 768).items()}
    state[f"layers.{tiny.AESTHETIC[variant][-1]}.bias"] += 5
    torch.save(state, tmp_path / "head.pth")
    assert scores(made(tmp_path / "head.pth")).tolist() == [5, 5, 5]


def test_v1_heads_of_both_widths_and_a_head_for_another_clip() -> None:
    state = torch.load(tiny.aesthetic_head("v1", 512))
    expected = embeddings(512) @ state["weight"][0] + state["bias"]
    torch.testing.assert_close(scores(made(tiny.aesthetic_head("v1", 512), 512)), expected)
    with pytest.raises(ValueError, match="for embeddings of 512 numbers; expected 768"):
        made(tiny.aesthetic_head("v1", 512)).load()


def test_a_file_that_was_saved_on_a_gpu_loads_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.load(tiny.aesthetic_head("linear"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, tmp_path / "head.pth")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "head.pth")
    expected = scores(made(tiny.aesthetic_head("linear")))
    assert torch.equal(scores(made(tmp_path / "head.pth")), expected)


def test_other_files_are_refused(tmp_path: Path) -> None:
    state = tiny.head_state((0, 2, 4, 6, 8), 768)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth with the tensors \['layers.0.bias'"):
        made(tmp_path / "other.pth").load()
    torch.save({"weight": Path("an object")}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="which torch cannot read as plain weights"):
        made(tmp_path / "pickled.pth").load()
    with pytest.raises(FileNotFoundError, match=r"download https://github.com/.*/sac%2Blogos%2Bava1-l14-linearMSE.pth"):
        Aesthetic().load()
