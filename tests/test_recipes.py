"""The recipes of docs/recipes.md: each command is built and checked, its figures are the forecast's; and what is refused of such runs."""

import json
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from flowalign.config import TrainConfig, load_config
from flowalign.errors import ConfigError
from flowalign.forecast.counts import RunCounts
from flowalign.forecast.memory import GIB, Memory, check, device_memory
from flowalign.forecast.recorded import RecordedFootprint
from flowalign.testing.shapes import shapes_folder
from tests.helpers.recipe_files import RECIPE_REWARDS, write_recipe_files

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^# ([\w-]+)\n(flowalign train .+(?:\n +.+)*)", PAGE, re.MULTILINE))
ROWS = {row[0].strip(" `"): row[1:] for line in PAGE.splitlines() if len(row := line.strip("|").split(" | ")) == 8}
FOOTPRINTS = json.loads((ROOT / "docs" / "results" / "model_memory.json").read_text())["models"]
MODELS = ("flux1_kontext", "qwen_image_edit", "qwen_image_edit_plus", "wan21_1_3b", "wan21_14b", "wan21_i2v", "wan22", "wan22_5b",
          "wan22_i2v", "hunyuan_video")  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a user who has fetched all files."""
    folder = tmp_path_factory.mktemp("recipes")
    write_recipe_files(folder)
    return folder


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch, large_machine: None) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place / "packages"))
    return place


def arguments(command: str) -> tuple[list[str], list[str]]:
    """The layers and the overrides of a command."""
    words = shlex.split(command.replace("\\\n", " "))[2:]
    return [word for word in words if word.startswith("configs/")], [
        word for word in words if not word.startswith("configs/")
    ]


def model_of(command: str) -> str:
    return re.findall(r"configs/models/(\w+)\.yaml", command)[0]


@cache
def folder_of(model: str, place: Path) -> Path:
    return shapes_folder(model, place / "models" / model, depth=2)


def load(layers: list[str], overrides: list[str], place: Path) -> TrainConfig:
    path = folder_of(model_of(" ".join(layers)), place)
    return load_config([str(ROOT / layer) for layer in layers], [f"policy.path={path}", *overrides])[0]


def test_the_table_has_a_row_for_each_command_and_the_commands_use_every_layer() -> None:
    assert {*ROWS} - {"recipe", "---"} == {*COMMANDS} and len(COMMANDS) == PAGE.count("flowalign train configs")
    text = " ".join(COMMANDS.values())
    assert set(re.findall(r"configs/rewards/(\w+)\.yaml", text)) == RECIPE_REWARDS
    assert set(re.findall(r"configs/models/(\w+)\.yaml", text)) == {*MODELS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_is_accepted_and_costs_what_the_table_says(name: str, at: Path) -> None:
    config = load(*arguments(COMMANDS[name]), at)
    counts, devices = RunCounts.of(config), config.run.device_count or 1
    own = RecordedFootprint(**FOOTPRINTS[model_of(COMMANDS[name])]["footprint"])
    memory, room = Memory(config, own, devices), device_memory(config, torch.device("cpu"))
    assert room is not None
    check(memory, room)
    largest = max(memory.peaks.values()) / GIB
    found = [f"{counts.images:,}", f"{counts.sampled:,} + {counts.trained + counts.frozen:,}", f"{largest:.0f}"]
    assert [cell.strip() for cell in ROWS[name][-3:]] == found
    judges = {each.name for each in config.evaluation.rewards}
    assert config.reward.name not in judges, "held out: other rewards than the trained one"


REFUSED = {
    "a reward of videos on images": (
        "flow_grpo", "flux1_kontext", "video_align_i2v", (),
        r"got reward 'motion_quality', which reads videos, with policy\.frames=1, which makes images",
    ),
    "a reward of images on videos": (
        "dance_grpo", "wan21_1_3b", "video_ocr", ("reward=rewards.PickScore",),
        r"got reward 'pick_score', which reads images, with policy\.frames=33, .*wrap it in rewards\.OnFrames",
    ),
    "a held-out reward of images on videos": (
        "dance_grpo", "wan21_1_3b", "video_ocr", ("evaluation.rewards=[rewards.PickScore]",),
        r"got evaluation\.rewards 'pick_score', which reads images",
    ),
    "a reward of edits on a model of texts": (
        "flow_grpo", "sd35_medium", "edit_reward", ("prompts=DanceGRPO/assets/video_prompts.txt", "evaluation.prompts=flow_grpo/dataset/ocr/test.txt"),
        r"got reward 'edit_reward', which compares with a source image, and the prompt 'a video 0' without one; expected a model of edits",
    ),
    "a part of a mix that reads sources": (
        "flow_grpo", "sd35_medium", "counting_edit", ("prompts=DanceGRPO/assets/video_prompts.txt", "evaluation.prompts=flow_grpo/dataset/ocr/test.txt"),
        r"got reward 'counted', which compares with a source image",
    ),
    "prompts of edits for a model of texts": (
        "flow_grpo", "wan21_1_3b", "video_align_i2v", (), r"with 1 source image for a WanPipeline; expected 0",
    ),
    "prompts of texts for a model of edits": (
        "flow_grpo", "flux1_kontext", "edit_pick_score", ("prompts=DanceGRPO/assets/video_prompts.txt",),
        r"with 0 source images for a FluxKontextPipeline; expected 1",
    ),
    "an edit reward on frames of a text-to-video model": (
        "dance_grpo", "wan21_1_3b", "video_ocr", ("reward={class_path: rewards.OnFrames, init_args: {reward: rewards.EditReward}}",),
        r"got reward 'edit_reward', which compares with a source image",
    ),
    "a gray copy for a score without motion": (
        "dance_grpo", "wan21_1_3b", "video_align",
        ("reward={class_path: rewards.VideoAlign, init_args: {templates: VideoAlign/prompt_template.py, dimensions: [VQ], gray_motion: true}}",),
        r"expected MQ among them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_would_do_something_else_is_refused_before_anything_is_loaded(case: str, at: Path) -> None:
    method, model, reward, overrides, message = REFUSED[case]
    layers = [f"configs/methods/{method}.yaml", f"configs/models/{model}.yaml", f"configs/rewards/{reward}.yaml"]
    with pytest.raises((ConfigError, ValueError), match=message):
        load(layers, list(overrides), at)


def test_a_file_that_is_missing_is_named(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, overrides = arguments(COMMANDS["wan21-14b-quality"])
    folder = folder_of("wan21_14b", at)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, ValueError), match=r"template file (VideoAlign|HPSv3)/.*cannot be read"):
        load_config([str(ROOT / layer) for layer in layers], [f"policy.path={folder}", *overrides])


def numbers_without_a_source(text: str) -> list[str]:
    """Lines of a layer with a number that has no comment beside it and does not stand in the comment that the file begins with."""
    lines = text.splitlines()
    head = " ".join(line for line in lines if line.startswith("#")).replace(",", "")
    found = []
    for line in lines:
        if line.startswith("#") or " #" in line:
            continue
        for number in re.findall(r"(?<![\w./-])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w./-])", line.partition(":")[2]):
            if not re.search(rf"(?<![\d.]){re.escape(f'{float(number):g}')}(?!\d|\.\d)", head):
                found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "layer",
    [
        *(f"models/{model}" for model in (*MODELS, "ltx_video")),
        *(f"rewards/{reward}" for reward in sorted(RECIPE_REWARDS)),
    ],
)
def test_every_number_has_its_source_beside_it_or_in_the_head_of_its_file(layer: str) -> None:
    assert numbers_without_a_source((ROOT / "configs" / f"{layer}.yaml").read_text(encoding="utf-8")) == []


def test_a_number_without_a_source_is_found() -> None:
    assert numbers_without_a_source("# guidance 2.5\na: 2.5\nb: 3 # ours\nc: {d: 4}\n") == ["c: {d: 4}"]


def test_the_script_of_the_table_knows_every_model() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "model_memory.py"))
    assert {model for model, needed in script["NEEDED"].items() if script["OF_VIDEOS"][0] in needed} == {
        *(model for model in MODELS if model.startswith("wan")), "hunyuan_video", "ltx_video"
    }  # fmt: skip
