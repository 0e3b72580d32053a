"""A reward as JSON: what is built of it is the same reward, and what cannot be is said at once."""

import json
from pathlib import Path

import pytest
import torch

from rewards import (
    OCR,
    ColorAccuracy,
    FunctionReward,
    Http,
    InWorker,
    JPEGCompressibility,
    Mix,
    RapidReader,
    WithTimeout,
)
from rewards.import_path import import_named
from rewards.remote.description import build, describe, fingerprint
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.remote_rewards import Spread

REWARDS = [
    JPEGCompressibility(divide_by=500),
    Mix([Spread(2.0), OCR(metric="soft", fold={"0": "O"}, recognizer=RapidReader(workers=1))], [1, 0.5]),
    ColorAccuracy(palette={"red": (200, 0, 0), "blue": (0, 0, 220)}),
    FunctionReward("tests.helpers.plain_rewards:brightness", inputs=("images",), channels=("a", "b")),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.name)
def test_what_is_built_is_the_same_reward(reward) -> None:
    text = json.dumps(describe(reward))
    other = build(json.loads(text))
    assert type(other) is type(reward) and other.name == reward.name and other.spec == reward.spec
    assert json.dumps(describe(other)) == text
    if not isinstance(reward, Mix):  # whose reader shows an address
        assert repr(other) == repr(reward)


def test_a_class_of_a_file_is_described_by_its_file(tmp_path: Path) -> None:
    source = Path("tests/helpers/remote_rewards.py").read_text()
    marks = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(source)
        reward = import_named(f"{tmp_path / folder / 'mine.py'}:Spread")(scale=3)
        assert describe(reward)["class_path"] == f"{tmp_path / folder / 'mine.py'}:Spread"
        assert type(build(describe(reward))) is type(reward)
        marks.append(fingerprint(reward))
    assert marks[0] == marks[1]  # the folder does not matter
    (tmp_path / "two" / "mine.py").write_text(source + "\n# changed\n")
    assert fingerprint(import_named(f"{tmp_path / 'two' / 'mine.py'}:Spread")(scale=3)) != marks[0]  # the content does


def test_a_function_of_a_file_is_known_by_the_files_content(tmp_path: Path) -> None:
    def mark(folder: str, source: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.py").write_text(source)
        return fingerprint(Mix([FunctionReward(f"{tmp_path / folder / 'mine.py'}:score")], [1]))

    first = mark("one", "def score(images, prompts): return [0.0] * len(prompts)")
    assert mark("two", "def score(images, prompts): return [0.0] * len(prompts)") == first
    assert mark("two", "def score(images, prompts): return [1.0] * len(prompts)") != first


def test_a_fingerprint_is_of_the_reward_and_not_of_its_place() -> None:
    mark = fingerprint(Spread(2.0))
    for placed in (InWorker(Spread(2.0)), Http(Spread(2.0)), WithTimeout(InWorker(Spread(2.0)), 5.0)):
        assert fingerprint(placed) == mark
    assert fingerprint(Mix([InWorker(Spread(2.0))], [1])) == fingerprint(Mix([Spread(2.0)], [1]))
    assert len({mark, fingerprint(Spread(2.5)), fingerprint(JPEGCompressibility())}) == 3


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (Plain(brightness), r"Plain\.answer=.*a function goes as its path"),
        (Plain(torch.nn.Linear(1, 1)), r"Plain\.answer=Linear.*expected what another process can build"),
        (Plain(torch.zeros(2)), r"Plain\.answer=tensor"),
        (Plain(object), r"Plain\.answer=<class"),
        (FunctionReward(lambda images, prompts: [0.0]), r"FunctionReward\.path=.*a function goes as its path"),
        (Mix([Spread(), Plain(brightness)], [1, 1]), r"Mix\.rewards\[1\]\.answer=.*expected what another"),
    ],
)
def test_what_no_other_process_can_build_is_refused_at_construction(reward, said: str) -> None:
    for place in (InWorker, Http):
        with pytest.raises(ValueError, match=said):
            place(reward)


def test_a_plain_class_is_built_from_the_arguments_that_it_keeps() -> None:
    reward = build(json.loads(json.dumps(describe(Kept(3)))))
    assert isinstance(reward, Kept) and reward.scale == 3 and reward.network is None


class Kept:
    name, spec = "kept", Spread.spec

    def __init__(self, scale, *, shift=0.0) -> None:
        self.scale, self.shift, self.network = scale, shift, None


def test_a_class_inside_a_function_is_refused() -> None:
    from dataclasses import dataclass

    @dataclass
    class Hidden(Spread):
        pass

    with pytest.raises(ValueError, match=r"Hidden, which no other process can import.*top of a module"):
        InWorker(Hidden())
