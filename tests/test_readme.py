"""What the README tells its reader to write in Python runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import squeezenet1_1

from flowalign.config import load_config
from flowalign.run.preflight import Prompts
from flowalign.run.trial import try_rewards
from rewards import RewardBatch, score

TINY = str(Path(__file__).parent / "data" / "tiny.yaml")
BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)


def test_the_python_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["redness"](torch.rand(2, 3, 4, 4), ["a", "b"]).shape == (2,)
    assert len(names["result"].scores["ocr"]) == len(names["images"]) == 2
    assert len(names["log_probs"]) == 16 and names["forest"].evaluations == 45


def test_the_class_of_the_readme_is_a_reward_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in BLOCKS if "class Aesthetic" in block)
    (tmp_path / "my_scorer.py").write_text(block)
    torch.save(squeezenet1_1(num_classes=1).state_dict(), tmp_path / "scorer.pt")
    monkeypatch.chdir(tmp_path)
    reward = "reward={class_path: ./my_scorer.py:Aesthetic, init_args: {weights: scorer.pt}}"
    config, _ = load_config(TINY, [reward])
    assert config.reward.model is None  # nothing is loaded by a check
    try_rewards(config, Prompts.of(config), "cpu")
    output = score(config.reward, RewardBatch(prompts=["a"] * 3, images=torch.rand(3, 3, 24, 48)))
    assert output.channels == ("aesthetic",) and output.valid.all() and output.scores.shape == (3, 1)
    config.reward.close()
    assert config.reward.model is None
