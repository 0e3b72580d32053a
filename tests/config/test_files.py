"""`./file.py:Name` names a part of any kind, or a function for a reward; the saved configuration works alone."""

from pathlib import Path

import pytest
import torch
import yaml

from flowalign.config import load_config
from flowalign.errors import ConfigError
from rewards import FunctionReward, RewardBatch, score

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
KINDS = {  # key -> class that the file's class is made of
    "rollout.kernel": "samplers.FlowSDE", "rollout.plan": "samplers.Window", "rollout.schedule": "samplers.PlainShift",
    "reward": "rewards.JPEGCompressibility", "trainer": "flowalign.trainers.PolicyGradient",
    "trainer.signal.credit": "flowalign.credit.Broadcast", "trainer.signal.advantage": "flowalign.advantage.Normalized",
    "trainer.signal.select": "flowalign.selectors.AllEdges", "trainer.objective": "flowalign.objectives.ClippedRatio",
    "trainer.step_weight": "flowalign.objectives.Uniform", "trainer.regularizers.kl": "flowalign.objectives.KLPenalty",
}  # fmt: skip
REWARDS = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from rewards import Reward, RewardBatch, RewardOutput, RewardSpec

@dataclass(frozen=True)
class Red:
    scale: float = 1.0
    name: str = "red"
    spec = RewardSpec()
    def load(self): ...
    def close(self): ...
    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(self.scale * batch.images[:, 0].mean((1, 2)), torch.ones(len(batch), dtype=torch.bool))

class Half:
    name = "half"

LIMIT = 3

def redness(images, prompts):
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def test_a_class_of_every_kind(folder: Path) -> None:
    node = yaml.safe_load(Path(CONFIG).read_text())
    text = "".join(f"import {name.rpartition('.')[0]}\n" for name in KINDS.values())
    for key, name in KINDS.items():
        mine = f"Mine{name.rpartition('.')[2]}"
        text += f"class {mine}({name}):\n    'Another of that kind.'\n"
        *sections, last = key.split(".")
        holder = node
        for section in sections:
            holder = holder.get("init_args", holder)[section]
        holder = holder.get("init_args", holder)
        arguments = holder[last]["init_args"] if isinstance(holder.get(last), dict) else {}
        holder[last] = {"class_path": f"./part.py:{mine}", "init_args": arguments}
    Path("part.py").write_text(text)
    Path("c.yaml").write_text(yaml.safe_dump(node))
    saved = load_config("c.yaml")[1]
    Path("config.yaml").write_text(yaml.safe_dump(saved))
    config, again = load_config("config.yaml")
    assert again == saved
    for key, name in KINDS.items():
        found = config
        for section in key.split("."):
            found = found[section] if isinstance(found, dict) else vars(found)[section]
        assert type(found).__name__ == f"Mine{name.rpartition('.')[2]}"


def test_a_reward_by_its_name_alone_scores(folder: Path) -> None:
    """Overrides reach its arguments; the dataclass's own annotations are read."""
    batch = RewardBatch(prompts=["a", "b"], images=torch.rand(2, 3, 4, 4))
    config, saved = load_config(CONFIG, ["reward=./mine.py:Red", "reward.scale=3"])
    assert saved["reward"] == {"class_path": "./mine.py:Red", "init_args": {"scale": 3.0, "name": "red"}}
    assert torch.equal(score(config.reward, batch).scores[:, 0], 3 * batch.images[:, 0].mean((1, 2)))


def test_a_function_where_a_reward_belongs_is_a_reward_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    Path("red_functions.py").write_text(REWARDS)
    mix = "reward={class_path: rewards.Mix, init_args: {rewards: [./mine.py:redness, ./mine.py:Red], weights: [1, 2]}}"
    both = "evaluation.rewards=[./mine.py:redness, {class_path: red_functions.redness, init_args: {name: other}}]"
    config, saved = load_config(CONFIG, [mix, both])
    first, other = config.evaluation.rewards
    assert type(first) is FunctionReward and (first.name, first.path) == ("redness", "./mine.py:redness")
    assert (other.name, other.path) == ("other", "red_functions.redness")
    assert [part.name for part in config.reward.rewards] == ["redness", "red"]
    Path("config.yaml").write_text(yaml.safe_dump(saved))
    assert load_config("config.yaml")[1] == saved
    with pytest.raises(
        ConfigError, match=r"rollout\.kernel='\./mine\.py:redness', a function; expected a class that is a Kernel"
    ):
        load_config(CONFIG, ["rollout.kernel=./mine.py:redness"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "./mine.py:Redd",
            r"reward: got './mine\.py:Redd': 'Redd' does not exist.*has Red, Half, redness \(did you mean 'Red'",
        ),
        ("./min.py:Red", r"there is no file .*min\.py"),
        ("./mine.py", r"reward: got path './mine\.py'; expected './my_file\.py:name'"),
        ("./mine.py:LIMIT", "of type int; expected a class, or a function for a reward"),
        ("./mine.py:Half", r"expected a Reward: .*it has no method `load\(self\) -> None`"),
        ("./needs.py:Red", "importing it raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("./leaves.py:Red", "importing it raised SystemExit: 3"),
        ("./wrong.py:Red", "importing it raised SyntaxError"),
        (
            "{class_path: ./mine.py:Red, init_args: {scael: 1}}",
            "unknown key 'reward.scael': did you mean 'reward.scale'",
        ),
        ("{class_path: ./mine.py:redness, init_args: {path: x}}", "unknown key 'reward.path'"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, name: str, said: str) -> None:
    Path("needs.py").write_text("import no_such_dependency\n")
    Path("leaves.py").write_text("import sys\nsys.exit(3)\n")
    Path("wrong.py").write_text("class Red(\n")
    with pytest.raises(ConfigError, match=said):
        load_config(CONFIG, [f"reward={name}"])


def test_a_changed_file_is_read_again_and_equal_names_do_not_meet(folder: Path) -> None:
    (folder / "other").mkdir()
    Path("other/mine.py").write_text(REWARDS.replace('name: str = "red"', 'name: str = "elsewhere"'))
    first = load_config(CONFIG, ["reward=./mine.py:Red"])[0].reward
    assert load_config(CONFIG, ["reward=./other/mine.py:Red"])[0].reward.name == "elsewhere"
    assert type(load_config(CONFIG, ["reward=./mine.py:Red"])[0].reward) is type(first)
    Path("mine.py").write_text(REWARDS.replace('name: str = "red"', 'name: str = "again"'))
    assert load_config(CONFIG, ["reward=./mine.py:Red"])[0].reward.name == "again"
