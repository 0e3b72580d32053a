"""What evaluations score and on what: the training reward too, and no prompt that is trained on unless that is asked for."""

from pathlib import Path

import pytest
import torch

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.run.held_out_rewards import held_out_rewards
from rewards import RewardBatch, labels_of, score
from tests.helpers.tiny_run import CONFIG

EDIT = 'reward={"class_path": "rewards.OCR", "init_args": {"metric": "edit"}}'
EXACT = 'evaluation.rewards=[{"class_path": "rewards.OCR", "init_args": {"metric": "exact"}}]'


def names(*overrides: str) -> list[str]:
    return [label for reward in held_out_rewards(load_config(CONFIG, overrides)[0]) for label in labels_of(reward)]


def test_the_training_reward_is_among_them_once_and_under_a_name_of_its_own() -> None:
    assert names() == ["jpeg_compressibility"]  # equal settings
    assert names(EDIT) == ["jpeg_compressibility", "ocr"]
    assert names(EDIT, EXACT) == ["ocr", "ocr_training"]
    assert names(EDIT, EXACT.replace("exact", "edit")) == ["ocr"]
    assert names("reward.place=worker") == ["jpeg_compressibility"]  # wherever it lives
    assert names(EDIT, EXACT, "evaluation.training_reward=false") == ["ocr"]


def test_under_another_name_it_scores_the_same() -> None:
    jpeg = 'evaluation.rewards=[{"class_path": "rewards.JPEGCompressibility", "init_args": {"divide_by": 2.0}}]'
    config, _ = load_config(CONFIG, [jpeg])
    _, renamed = held_out_rewards(config)
    batch = RewardBatch(prompts=["a", "b"], images=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(score(renamed, batch).scores, score(config.reward, batch).scores)
    assert renamed.spec == config.reward.spec and renamed.name == "jpeg_compressibility_training"


def test_prompts_that_are_trained_on_are_refused_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\na dog\na fox\n")
    (tmp_path / "held.txt").write_text("a bird\na dog\na cat\n")
    prompts = [f"prompts={tmp_path}/train.txt", f"evaluation.prompts={tmp_path}/held.txt"]
    with pytest.raises(
        ConfigError, match=r"got 2 of the 3 prompts of evaluation.prompts=.*held.txt among .*such as 'a dog'"
    ):
        load_config(CONFIG, [*prompts, "evaluation.count=3"])
    load_config(CONFIG, [*prompts, "evaluation.count=1"])  # the first is new
    load_config(CONFIG, [*prompts, "evaluation.count=3", "evaluation.allow_training_prompts=true"])
