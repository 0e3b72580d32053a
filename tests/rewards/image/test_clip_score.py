"""CLIPScore and PickScore on tiny checkpoints of transformers and open_clip: formulas, scales, backbones."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewards import CLIPScore, PickScore, RewardBatch, RewardError, score
from rewards.image.clip import load_clip
from rewards.image.preprocess import Preprocess
from tests.helpers import tiny_rewards as tiny

PROMPTS = ["a red cat", 'the word "MOON"', "", "long " * 60]
IMAGES = torch.rand(4, 3, 32, 67, generator=torch.Generator().manual_seed(0))  # an odd number to crop


def scores(reward: CLIPScore | PickScore, images: Tensor = IMAGES) -> Tensor:
    return score(reward, RewardBatch(prompts=PROMPTS, images=images)).scores[:, 0]


def cosine_by_hand() -> Tensor:
    """With transformers' own calls, sample by sample, without padding."""
    from transformers import CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(tiny.clip()).eval(), CLIPTokenizer.from_pretrained(tiny.clip())
    pixels, found = Preprocess(32, crop_offset="floor")(IMAGES), []
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = network(input_ids=ids, pixel_values=pixels[row : row + 1])
        found.append(F.cosine_similarity(output.image_embeds, output.text_embeds))
    return torch.cat(found)


def test_the_score_is_the_cosine_of_each_image_with_its_own_prompt() -> None:
    cosine = cosine_by_hand()
    torch.testing.assert_close(scores(CLIPScore(str(tiny.clip()))), cosine, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores(PickScore(str(tiny.clip()), scale="cosine")), cosine, rtol=1e-5, atol=1e-6)


def test_the_scales_are_those_of_their_names() -> None:
    folder, logit_scale = str(tiny.clip()), math.exp(2.6592)
    cosine = scores(CLIPScore(folder))
    assert float(cosine.min()) < 0 < float(cosine.max())
    torch.testing.assert_close(scores(CLIPScore(folder, "cosine_100")), 100 * cosine)
    torch.testing.assert_close(scores(CLIPScore(folder, "logit_over_30")), logit_scale * cosine / 30)
    torch.testing.assert_close(scores(CLIPScore(folder, "clipscore")), 2.5 * cosine.clamp(min=0))
    torch.testing.assert_close(scores(PickScore(folder)), logit_scale * cosine)
    torch.testing.assert_close(scores(PickScore(folder, "logit_over_26")), logit_scale * cosine / 26)


def test_the_features_are_those_of_transformers_whatever_it_returns() -> None:
    """A tensor in version 4, an object with pooler_output in version 5."""
    clip = load_clip(str(tiny.clip()), None, torch.float32)
    pixels = torch.randn(2, 3, 32, 32)
    theirs = clip.network.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(clip.images(pixels), theirs if isinstance(theirs, Tensor) else theirs.pooler_output)


def test_no_score_goes_through_the_call_that_changed_between_versions(monkeypatch) -> None:
    """get_image_features and get_text_features: a tensor in transformers 4, an object in 5, whose [0] is something else."""
    from transformers import CLIPModel

    expected = [scores(made(str(tiny.clip()))) for made in (CLIPScore, PickScore)]
    for name in ("get_image_features", "get_text_features", "forward"):
        monkeypatch.setattr(CLIPModel, name, lambda *_, **__: pytest.fail("asked"))
    for before, made in zip(expected, (CLIPScore, PickScore), strict=True):
        assert torch.equal(scores(made(str(tiny.clip()))), before)


@pytest.mark.parametrize("grad", [False, True])
def test_texts_are_encoded_once_for_calls_with_the_same_prompts(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PickScore and HPSv2 score by the same cosine; the second scores are bit for bit those without what was kept."""
    clip = load_clip(str(tiny.clip()), None, torch.float32)
    encoded: list[list[str]] = []
    counted = replace(clip, texts=lambda prompts: (encoded.append(prompts), clip.texts(prompts))[1])
    pixels = torch.randn(4, 3, 32, 32).requires_grad_(grad)
    with torch.inference_mode():
        counted.cosine(pixels, PROMPTS)  # must not leave what autograd refuses
    kept = counted.cosine(pixels, PROMPTS)
    assert encoded == [PROMPTS] and torch.equal(kept, clip.cosine(pixels, PROMPTS)) and kept.requires_grad == grad
    several = ["a", "b", "a", "a"]
    expected = torch.cat([clip.cosine(pixels[row : row + 1], [prompt]) for row, prompt in enumerate(several)])
    torch.testing.assert_close(counted.cosine(pixels, several), expected)
    counted.cosine(pixels[:2], ["a", "b"])  # how often each prompt comes does not matter
    assert encoded == [PROMPTS, ["a", "b"]]
    monkeypatch.setattr("rewards.image.clip.KEPT", 2)
    counted.cosine(pixels[:1], ["c"])
    counted.cosine(pixels[:2], ["a", "b"])
    counted.cosine(pixels, PROMPTS)  # the oldest has gone
    assert encoded == [PROMPTS, ["a", "b"], ["c"], PROMPTS]


def test_what_is_kept_goes_with_the_model() -> None:
    reward = CLIPScore(str(tiny.clip()))
    before = scores(reward)
    reward.close()
    reward.model = str(tiny.clip(24))
    other = scores(reward)
    assert not torch.equal(before, other) and torch.equal(other, scores(CLIPScore(str(tiny.clip(24)))))


def test_what_is_longer_than_the_context_is_cut_and_keeps_its_end() -> None:
    clip = load_clip(str(tiny.clip()), None, torch.float32)
    long = "a " * 75  # with start and end, 77 tokens
    one, cut, short = clip.texts([long, long + "b", long[2:]])
    torch.testing.assert_close(one, cut)
    assert float((one - short).abs().max()) > 1e-3


def test_the_logit_scale_is_not_rounded_with_the_weights() -> None:
    exact = math.exp(2.6592)
    assert load_clip(str(tiny.clip()), None, torch.bfloat16).scale == pytest.approx(exact, rel=1e-6)
    rounded = torch.tensor(2.6592, dtype=torch.bfloat16).exp().item()
    assert abs(rounded / exact - 1) > 2e-3


def test_bf16_is_close_to_fp32() -> None:
    exact, low = (scores(PickScore(str(tiny.clip()), dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert float((low - exact).abs().max()) < 1e-2 * math.exp(2.6592) and not torch.equal(low, exact)


@pytest.mark.parametrize(("mode", "fit"), [("shortest", "crop"), ("longest", "pad"), ("squash", "squash")])
def test_open_clip_brings_preprocessing_and_tokenizer(mode: str, fit: str) -> None:
    """A folder that holds configuration, weights and a tokenizer of its own."""
    import open_clip

    folder = tiny.open_clip_folder(mode)
    network, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    assert tokens.shape == (4, 24) and tokens.amax(1).tolist() == [513] * 4  # also the prompt that was cut ends
    pixels = Preprocess(224, fit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))(IMAGES)
    with torch.no_grad():
        expected = F.cosine_similarity(network.encode_image(pixels), network.encode_text(tokens))
    torch.testing.assert_close(scores(CLIPScore(str(folder))), expected, rtol=1e-5, atol=1e-6)
    elsewhere = CLIPScore(f"local-dir:{folder}", tokenizer=str(tiny.clip()))
    torch.testing.assert_close(scores(elsewhere), expected, rtol=1e-5, atol=1e-6)
    picture = RewardBatch(prompts=[""], images=IMAGES[:1]).pixels()[0]
    from torchvision.transforms.functional import to_pil_image

    reference = Preprocess(224, fit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))(picture[None].float() / 255, "pil")
    torch.testing.assert_close(reference[0], theirs(to_pil_image(picture)))


def test_pillow_and_tensors_differ_little_and_only_tensors_have_gradients() -> None:
    tensor, pil = (CLIPScore(str(tiny.clip()), preprocess=mode) for mode in ("tensor", "pil"))
    difference = float((scores(tensor) - scores(pil)).abs().max())
    assert 0 < difference < 0.01
    assert tensor.spec.differentiable and not pil.spec.differentiable
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(RewardError, match="which this is not"):
        score(pil, RewardBatch(prompts=PROMPTS, images=images), grad=True)


def test_the_published_scale_has_no_gradient_below_zero() -> None:
    images = IMAGES.clone().requires_grad_()
    output = score(CLIPScore(str(tiny.clip()), "clipscore"), RewardBatch(prompts=PROMPTS, images=images), grad=True)
    (gradient,) = torch.autograd.grad(output.scores.sum(), images)
    positive = (output.scores[:, 0] > 0).tolist()
    assert [bool(row.any()) for row in gradient] == positive and {*positive} == {True, False}


def test_a_checkpoint_that_lacks_weights_or_words_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny.clip(), tmp_path / "clip"))
    state = load_file(broken / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a CLIPModel, the first 'visual_projection.weight'"):
        CLIPScore(str(broken)).load()
    for file in tiny.clip().glob("*"):
        shutil.copy(file, broken)
    for file in broken.glob("token*"):
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="got model="):
        CLIPScore(str(broken)).load()
    CLIPScore(str(broken), tokenizer=str(tiny.clip())).load()
    (broken / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="which transformers cannot load"):
        CLIPScore(str(broken), tokenizer=str(tiny.clip())).load()
    empty = Path(shutil.copytree(tiny.open_clip_folder(), tmp_path / "open"))
    (empty / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="which open_clip cannot load"):
        CLIPScore(str(empty)).load()
