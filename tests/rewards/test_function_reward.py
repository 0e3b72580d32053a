"""A user's function by file and by import path; misspelt names suggest the right one."""

from functools import partial

import pytest
import torch

from rewards import FunctionReward, RewardBatch, RewardError, score

SOURCE = '''
from __future__ import annotations

from dataclasses import dataclass
import torch

LIMIT = 3

def shininess(images, prompts):
    return images.mean(dim=(1, 2, 3))

def wordy(images, prompts, word, bonus=None):
    return [len(w) + (b or 0) for w, b in zip(word, bonus or [0] * len(word))]

def everything(images, prompts, **metadata):
    return [float(len(metadata)) + len(p) for p in prompts]

def holes(images, prompts):
    return [1.0, None, float("nan")]

def short(images, prompts):
    return [1.0]

def text(images, prompts):
    return ["good"] * len(prompts)

def complex_ones(images, prompts):
    return [1 + 1j] * len(prompts)

def fails(images, prompts):
    raise ZeroDivisionError("oh")

@dataclass
class Needs:
    """with string annotations, dataclasses look their own module up"""
    x: int = 0
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    for folder in ("mine", "mine/inner"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "mine" / "inner" / "shiny_rewards.py").write_text(SOURCE)
    (tmp_path / "mine" / "needy_rewards.py").write_text("import no_such_dependency\n\ndef f(images, prompts): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


BATCH = RewardBatch(
    prompts=["a", "bb", "ccc"],
    images=torch.rand(3, 3, 4, 4),
    metadata=[{"word": "KITE", "bonus": 1}, {"word": "OX"}, {"word": "LAMP"}],
)


@pytest.mark.parametrize(
    "path",
    [
        "./my_rewards.py:shininess",
        "my_rewards.py:shininess",
        "mine.inner.shiny_rewards:shininess",
        "mine.inner.shiny_rewards.shininess",
    ],
)
def test_by_file_and_by_import_path(file, path):
    reward = FunctionReward(path)
    assert reward.name == "shininess"
    output = score(reward, BATCH)
    assert torch.equal(output.scores[:, 0], BATCH.images.mean(dim=(1, 2, 3))) and output.valid.all()


def test_a_function_itself():
    def brightness(images, prompts, word):
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(w)) for w in word])

    reward = FunctionReward(brightness)
    assert (reward.name, FunctionReward(brightness, name="mine").name) == ("brightness", "mine")
    expected = BATCH.images.mean(dim=(1, 2, 3)) + torch.tensor([4.0, 2.0, 4.0])
    assert torch.equal(score(reward, BATCH).scores[:, 0], expected)
    reward.load()
    assert FunctionReward(lambda images, prompts: [0.0] * len(prompts)).name == "lambda"
    assert FunctionReward(partial(brightness, word=[])).name == "partial"
    with pytest.raises(TypeError, match=r"got 3 as a reward; expected a function, or its path"):
        FunctionReward(3)
    with pytest.raises(RewardError, match=r"reward 'brightness' needs the metadata column 'word'"):
        score(reward, RewardBatch(prompts=["a"], images=torch.rand(1, 3, 4, 4)))


def test_metadata_columns_that_the_function_names(file):
    assert score(FunctionReward("./my_rewards.py:wordy"), BATCH).scores[:, 0].tolist() == [5, 2, 4]
    assert score(FunctionReward("./my_rewards.py:everything"), BATCH).scores[:, 0].tolist() == [3, 4, 5]


def test_missing_column_is_an_error_with_a_guess(file):
    batch = RewardBatch(prompts=["a"], images=torch.rand(1, 3, 4, 4), metadata=[{"words": "KITE"}])
    with pytest.raises(RewardError, match=r"needs the metadata column 'word'.*did you mean 'words'\?"):
        score(FunctionReward("./my_rewards.py:wordy"), batch)


def test_none_and_nan_mask_the_sample(file):
    output = score(FunctionReward("./my_rewards.py:holes"), BATCH, max_fail_rate=0.7)
    assert output.valid[:, 0].tolist() == [True, False, False] and output.scores[1:].isnan().all()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"scores has shape \[1\]"),
        ("text", "expected one number per sample"),
        ("complex_ones", "expected one number per sample .complex numbers"),
        ("fails", "ZeroDivisionError: oh"),
    ],
)
def test_bad_answers_name_the_reward(file, function, message):
    with pytest.raises(RewardError, match=rf"reward '{function}'.*{message}"):
        score(FunctionReward(f"./my_rewards.py:{function}"), BATCH)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./my_rewards.py:shinyness", r"'shinyness' does not exist.*did you mean 'shininess'\?"),
        ("mine.inner.shiny_rewards:shinines", r"did you mean 'shininess'\?"),
        ("./my_rewards.py:LIMIT", r"LIMIT', of type int; expected a function"),
        (
            "mine.inner.shiny_reward:shininess",
            r"no module 'mine.inner.shiny_reward' \(did you mean 'shiny_rewards'",
        ),
        ("mine.iner.shiny_rewards:shininess", r"no module 'mine.iner' \(did you mean 'inner'\?\)"),
        ("no_such_package_here.x:f", "no module 'no_such_package_here'.*write './file.py:f'"),
        ("mine.inner.shiny_rewards.deeper:f", "no module 'mine.inner.shiny_rewards.deeper'"),
    ],
)
def test_misspelt_names_suggest_the_right_one(file, path, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(path).load()


def test_a_missing_dependency_is_not_taken_for_a_misspelt_path(file):
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        FunctionReward("mine.needy_rewards:f").load()


@pytest.mark.parametrize(
    "path", ["shininess", "./my_rewards.py", "./tiny.yaml", "../x:y", "./my_rewards.py:", ":shininess", "a.b:c d", ""]
)
def test_malformed_paths_fail_at_construction(file, path):
    with pytest.raises(ValueError, match="got path"):
        FunctionReward(path)


def test_missing_file_fails_at_construction(file):
    with pytest.raises(ValueError, match=r"there is no file .*my_reward\.py"):
        FunctionReward("./my_reward.py:shininess")
