"""ImageReward on a tiny file of the published layout, against BLIP written out from the tensors."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import ImageReward, RewardBatch, score
from rewards.image.preprocess import Preprocess
from tests.helpers import tiny_rewards as tiny

PROMPTS = ["a red cat", "the word moon, in a very long sentence that goes on", ""]
IMAGES = torch.rand(3, 3, 32, 67, generator=torch.Generator().manual_seed(0))  # an odd number to crop


def made(folder: Path | None = None) -> ImageReward:
    return ImageReward(str(folder or tiny.image_reward()), tokenizer=str(tiny.image_reward()))


def scores(reward: ImageReward, prompts: list[str]) -> Tensor:
    return score(reward, RewardBatch(prompts=prompts, images=IMAGES)).scores[:, 0]


class ByHand:
    """BLIP from the tensors of the file, one image and one prompt without padding."""

    def __init__(self) -> None:
        self.state = torch.load(tiny.image_reward() / "ImageReward.pt")

    def __call__(self, pixels: Tensor, ids: list[int]) -> Tensor:
        hidden = self.text(self.see(pixels), ids)[0]
        for place in tiny.AESTHETIC["linear"]:
            hidden = self.linear(f"mlp.layers.{place}", hidden)
        return (hidden[0] - 0.16717362830052426) / 1.0333394966054072

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        parts = [part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (query, key, value)]
        weights = (parts[0] @ parts[1].transpose(1, 2) * parts[0].shape[2] ** -0.5).softmax(2)
        return (weights @ parts[2]).transpose(0, 1).flatten(1)

    def see(self, pixels: Tensor) -> Tensor:
        """[tokens, width] of pixels [3, S, S]."""
        eye = "blip.visual_encoder"
        weight, bias = (self.state[f"{eye}.patch_embed.proj.{name}"] for name in ("weight", "bias"))
        patches = F.conv2d(pixels, weight, bias, stride=16).flatten(1).T
        x = torch.cat([self.state[f"{eye}.cls_token"][0], patches]) + self.state[f"{eye}.pos_embed"][0]
        for block in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
            parts = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(*parts, heads=2))
            wide = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", wide)
        return self.norm(f"{eye}.norm", x, 1e-6)

    def text(self, image: Tensor, ids: list[int]) -> Tensor:
        """[tokens, width] of a prompt that looks at the image."""
        words, places = (
            self.state[f"blip.text_encoder.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position")
        )
        x = self.norm("blip.text_encoder.embeddings.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
        for block in ("blip.text_encoder.encoder.layer.0", "blip.text_encoder.encoder.layer.1"):
            for kind in ("attention", "crossattention"):
                seen, name = (x if kind == "attention" else image), f"{block}.{kind}"
                query = self.linear(f"{name}.self.query", x)
                key, value = self.linear(f"{name}.self.key", seen), self.linear(f"{name}.self.value", seen)
                new = self.linear(f"{name}.output.dense", self.attend(query, key, value, heads=2))
                x = self.norm(f"{name}.output.LayerNorm", new + x, 1e-12)
            wide = F.gelu(self.linear(f"{block}.intermediate.dense", x))
            x = self.norm(f"{block}.output.LayerNorm", self.linear(f"{block}.output.dense", wide) + x, 1e-12)
        return x


def tokens(prompt: str) -> list[int]:
    """Every letter is a token: the first of a word, and those that go on (##)."""
    vocabulary = (tiny.image_reward() / "vocab.txt").read_text().split("\n")
    letters = [
        f"##{letter}" if place and word[place - 1].isalpha() and letter.isalpha() else letter
        for word in prompt.split() for place, letter in enumerate(word)
    ]  # fmt: skip
    return [vocabulary.index(piece) for piece in ["[CLS]", *letters[:33], "[SEP]"]]


def test_the_score_is_blips_of_the_published_tensors() -> None:
    """So every name of the file is where it belongs: exchanging two norms, say, would show."""
    pixels, blip = Preprocess(32)(IMAGES), ByHand()
    expected = torch.stack([blip(row, tokens(prompt)) for row, prompt in zip(pixels, PROMPTS, strict=True)])
    torch.testing.assert_close(scores(made(), PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_prompts_are_cut_at_35_tokens() -> None:
    reward, longest = made(), "abcdefghijklmnopqrstuvwxyzabcdefg"  # 33 letters, start and end
    full, cut, short = (
        scores(reward, [longest] * 3),
        scores(reward, [longest + "h"] * 3),
        scores(reward, [longest[:-1]] * 3),
    )
    assert torch.equal(full, cut)
    assert float((full - short).abs().max()) > 1e-3


def test_the_tokenizer_is_built_from_a_vocabulary_file_and_knows_two_more_tokens(tmp_path: Path) -> None:
    vocabulary = (tiny.image_reward() / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(vocabulary.rpartition("\n")[0])
    with pytest.raises(ValueError, match=r"with 72 tokens, \[DEC\] and \[ENC\] among them; expected 73"):
        ImageReward(str(tiny.image_reward()), tokenizer=str(tmp_path)).load()


def test_every_tensor_has_a_place(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.image_reward(), tmp_path / "model"))
    state = torch.load(folder / "ImageReward.pt")

    def refused(message: str, **changes: str) -> None:
        renamed = {changes.get(name.replace(".", "_"), name): tensor for name, tensor in state.items()}
        torch.save(renamed, folder / "ImageReward.pt")
        with pytest.raises(ValueError, match=message):
            made(folder).load()

    refused("a tensor 'other.norm.bias'", blip_visual_encoder_norm_bias="other.norm.bias")
    refused("not those of a BlipVisionModel", blip_visual_encoder_norm_bias="blip.visual_encoder.norm.other")
    name = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    refused("not those of a BlipTextModel", **{name.replace(".", "_"): "blip.text_encoder.more"})
    refused(r"\(mlp.*with the tensors", mlp_layers_7_bias="mlp.layers.8.bias")
    refused("without blip.visual_encoder", blip_visual_encoder_pos_embed="blip.visual_encoder.positions")
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"and no ImageReward.pt there; expected it: put it into"):
        made(folder).load()
