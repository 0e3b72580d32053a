"""EditReward on a tiny Qwen2.5-VL with two heads."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rewards import EditReward, RewardBatch, RewardError, score
from rewards.qwen.weights import head_of, split_heads, todays_names
from tests.helpers import tiny_qwen as tiny
from tests.helpers.qwen_by_hand import by_hand

PROMPTS = ["make it red", "remove the second dog, please"]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (2, 3, 40, 75), dtype=torch.uint8, generator=GENERATOR)
SOURCES = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=GENERATOR) for size in ((40, 75), (90, 30))]
BATCH = RewardBatch(prompts=PROMPTS, images=IMAGES, conditions=[[source] for source in SOURCES])


@cache
def made(model: Path | None = None, **settings: Any) -> EditReward:
    given = {**tiny.ARGUMENTS["EditReward"](), **({"model": str(model)} if model else {})}
    return EditReward(**{**given, **settings})


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_each_head_is_that_of_transformers_with_its_own_text(positions: Any) -> None:
    """The source comes first, then the result, then the text."""
    state = todays_names(load_file(tiny.edit_reward() / "model.safetensors"))
    output = score(made(positions=positions, rope="exact", pooling="none"), BATCH)
    assert output.channels == ("instruction_following", "quality") and output.uncertainty is not None
    seen = [[source / 255, image / 255] for source, image in zip(SOURCES, IMAGES, strict=True)]
    for column, (head, asked) in enumerate((("head_0", "Done as asked? {}\n"), ("head_1", "Is the edit clean? {}\n"))):
        texts = [asked.format(prompt) + tiny.TEXTS["suffix"] for prompt in PROMPTS]
        hidden = by_hand(state, "qwen2_5_vl", ["<|Reward|>"], positions, seen, texts, "image")[:, 0]
        with torch.no_grad():
            mu, log_sigma = head_of(split_heads(state)[1][head], "")(hidden).T
        torch.testing.assert_close(output.scores[:, column], mu, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.uncertainty[:, column], log_sigma.exp(), rtol=1e-4, atol=1e-5)


def test_heads_are_pooled_and_the_first_number_is_the_score() -> None:
    apart, mean, low = (score(made(pooling=pooling), BATCH) for pooling in ("none", "mean", "min"))
    assert apart.uncertainty is not None and mean.uncertainty is not None and low.uncertainty is not None
    torch.testing.assert_close(mean.scores[:, 0], apart.scores.mean(1))
    torch.testing.assert_close(mean.uncertainty[:, 0], apart.uncertainty.log().mean(1).exp())
    torch.testing.assert_close(low.scores[:, 0], apart.scores.amin(1))
    torch.testing.assert_close(low.uncertainty[:, 0], apart.uncertainty.amin(1))
    for column, name in enumerate(("instruction_following", "quality")):
        torch.testing.assert_close(mean.components[name], apart.scores[:, column])


def test_which_image_is_the_source_matters() -> None:
    forth = RewardBatch(prompts=PROMPTS[:1], images=IMAGES[:1], conditions=[[SOURCES[0]]])
    back = RewardBatch(prompts=PROMPTS[:1], images=SOURCES[0][None], conditions=[[IMAGES[0]]])
    assert float((score(made(), forth).scores - score(made(), back).scores).abs()) > 1e-4


def test_a_sample_without_a_source_has_no_score() -> None:
    output = score(made(), replace(BATCH, conditions=[[], [SOURCES[1]]]))
    assert output.valid[:, 0].tolist() == [False, True]
    assert output.info == ["no source image: its conditions are empty", ""]
    torch.testing.assert_close(output.scores[1], score(made(), BATCH).scores[1])
    with pytest.raises(RewardError, match="got a batch with images; expected conditions, which it reads"):
        score(made(), replace(BATCH, conditions=None))
    with pytest.raises(RewardError, match=r"got a condition in -1..1; expected \[0, 1\]"):
        score(made(), replace(BATCH, conditions=[[torch.linspace(-1, 1, 3 * 64).view(3, 8, 8)], [SOURCES[1]]]))


def test_a_torch_file_with_the_weights_under_model_is_read_too() -> None:
    assert torch.equal(score(made(tiny.edit_reward("model.pth")), BATCH).scores, score(made(), BATCH).scores)


def test_texts_come_from_two_modules_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "EditReward" / "dataset"
    folder.mkdir(parents=True)
    (tmp_path / "EditReward" / "__init__.py").write_text("raise RuntimeError('is read, not run')")
    texts = {name: repr(tiny.TEXTS[name]) for name in ("instruction_following", "quality", "suffix")}
    (folder / "prompts.py").write_text(
        f"INSTRUCTION_EDIT_FOLLOWING = {texts['instruction_following']}\nINSTRUCTION_EDIT_QUALITY = {texts['quality']}\n"
    )
    (folder / "data_collator_qwen_edit.py").write_text(f"prompt_with_special_token = {texts['suffix']}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(score(made(templates="EditReward"), BATCH).scores, score(made(), BATCH).scores)
