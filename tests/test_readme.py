"""What the README says is true: its Python runs, its table is the measured one and loads, its badges are pyproject's."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchvision.models import squeezenet1_1

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.run.preflight import Prompts
from flowalign.run.trial import try_rewards
from rewards import RewardBatch, score

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "data" / "tiny.yaml")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(README):
        exec(block, names)
    assert names["redness"](torch.rand(2, 3, 4, 4), ["a", "b"]).shape == (2,)
    assert len(names["result"].scores["ocr"]) == len(names["images"]) == 2
    assert len(names["log_probs"]) == 16 and names["forest"].evaluations == 45
    assert Path("kite.png").exists() and bool(names["found"].total > names["found"].first_total)
    written = re.search(r'found\.save\("kite"\)  # (.*)', README)
    assert written and written[1].split(", ") == sorted(
        (path.name for path in Path("kite").iterdir()), key=written[1].index
    )


def test_the_class_of_the_page_of_rewards_is_a_reward_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks((ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"))
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


# ------------------------------------------------------------------------------------------ the table of methods

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.partition("| method | file |")[2].partition("\n\n")[0].splitlines()[2:]
]
OVERRIDES = dict(re.findall(r"^([¹²³⁴]) with `(.*?)`", README, re.M))


def test_the_gains_of_the_table_are_the_measured_ones() -> None:
    measured: dict[str, Any] = {}
    for name in ("glyphs_grpo", "glyphs_trainers"):
        measured |= json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["methods"]
    assert len(ROWS) > 10
    for _, file, seeds, gain, evaluations, target, *_ in ROWS:
        method = measured["ours" if file == "`glyphs_trees`" else file.strip("`")]
        value, low, high = (
            f"{100 * number:+.1f}".replace("-", "−") for number in (method["gain"], *method["gain_ci95"])
        )
        to_target = method["evaluations_to_target"]
        assert gain == f"{value} [{low}, {high}]", file
        assert (seeds, evaluations) == (str(len(method["seeds"])), f"{method['evaluations']:,}"), file
        assert target == ("–" if to_target is None else f"{to_target:,}"), file


@pytest.mark.slow  # twenty-odd configurations
@pytest.mark.parametrize(("model", "column", "reward"), [("sd35_medium", 6, "ocr_glyphs"), ("sd15", 7, "jpeg")])
def test_what_the_table_says_loads_does(
    model: str, column: int, reward: str, tiny_pipeline: Path, tiny_sd15_pipeline: Path, large_machine: None
) -> None:
    path = f"policy.path={tiny_sd15_pipeline if model == 'sd15' else tiny_pipeline}"
    for row in ROWS:
        state, *marks = row[column].split()
        if state == "–":
            continue
        files = [f"configs/methods/{row[1].strip('`')}.yaml", f"configs/models/{model}.yaml", f"configs/rewards/{reward}.yaml"]  # fmt: skip
        if marks:
            with pytest.raises(ConfigError):
                load_config(files, [path])
        load_config(files, [path, *(OVERRIDES[mark] for mark in marks)])


# ------------------------------------------------------------------------------------------ badges, citation


def test_the_badges_say_what_the_project_says() -> None:
    drawn = runpy.run_path(str(ROOT / "scripts" / "draw_badges.py"))
    shown = {Path(file).name: text for text, file in re.findall(r"!\[(.*?)\]\((docs/pictures/badges/.*?)\)", README)}
    texts = {name: f"{label}: {value}" for name, (label, value) in drawn["texts"]().items()}
    assert shown == texts and {PROJECT["license"], PROJECT["requires-python"][2:]} <= set(
        " ".join(texts.values()).split()
    )
    for name, words in drawn["texts"]().items():
        svg = (drawn["FOLDER"] / name).read_text(encoding="utf-8")
        assert svg == drawn["badge"](*words), "run scripts/draw_badges.py"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (str(citation["version"]), citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"version = {{{citation['version']}}}" in README and f"title = {{{citation['title']}}}" in README
