"""The files that the recipes of docs/recipes.md name, in their places and layouts, with made-up content."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from flowalign.prompt_sets import PROMPT_SETS
from rewards.judges.edit_score import WORDINGS as EDIT_SCORE
from rewards.judges.template import Wording
from rewards.qwen.edit_reward import PROMPTS, SUFFIX
from rewards.qwen.hpsv3 import WORDINGS as HPSV3
from rewards.qwen.video_align import WORDINGS as VIDEO_ALIGN

# layers of configs/rewards that read such files; tests/test_recipes.py
RECIPE_REWARDS = {
    "counting_edit", "edit_pick_score", "edit_reward", "edit_score", "video_align", "video_align_i2v", "video_longcat", "video_ocr",
    "video_pick_score",
}  # fmt: skip
COUNTED = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}


def write_recipe_files(folder: Path) -> None:
    """Below `folder`, the working directory of a user; packages of texts in its folder `packages`, for sys.path."""
    _texts(folder / "VideoAlign" / "prompt_template.py", VIDEO_ALIGN.values())
    _texts(folder / "HPSv3" / "hpsv3" / "dataset" / "data_collator_qwen.py", HPSV3.values())
    _texts(folder / "packages" / "editscore" / "vie_prompts.py", EDIT_SCORE.values())
    _texts(folder / "packages" / "EditReward" / "dataset" / "prompts.py", PROMPTS.values())
    _texts(folder / "packages" / "EditReward" / "dataset" / "data_collator_qwen_edit.py", SUFFIX.values())
    few, many = PROMPT_SETS["pickapic"].counts
    (vbench,) = PROMPT_SETS["vbench"].counts
    _write(folder / "VideoAlign/datasets/video_eval_prompts/vbench.csv", ["prompt", *_numbered("vbench", vbench)])
    _write(folder / "DanceGRPO/assets/video_prompts.txt", _numbered("a video", 64))
    for name, count in (("train", many), ("test", few)):
        _write(folder / f"DiffusionNFT/dataset/pickscore/{name}.txt", _numbered(name, count))
        _write(folder / f"flow_grpo/dataset/ocr/{name}.txt", [f'a sign "{text}"' for text in _numbered(name, 64)])
        _rows(folder / f"flow_grpo/dataset/counting_edit/{name}_metadata.jsonl", name, "image", "one.png", **COUNTED)
        place = "Flow-Factory/dataset/sharegpt4o_image_mini"
        _rows(folder / f"{place}/{name}.jsonl", name, "image", "one.png", below="images")
        condition = {"modality": "image", "role": "condition", "uri": "data/one.png"}
        _rows(folder / f"UniRL/datasets/image_edit/{name}.jsonl", name, "media", [condition])
    _rows(folder / "EditScore-RL-Data/rl.jsonl", "rl", "input_images", ["images/one.png"], prompt="instruction")


def _numbered(text: str, count: int) -> list[str]:
    return [f"{text} {number}" for number in range(count)]


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _texts(path: Path, wordings: Sequence[Wording]) -> None:
    """As Python that assigns each text to its name, as the code of a judge does."""
    _write(path, [f"class Prompts:\n    def __init__(self):\n        {each.variable} = {' '.join(each.placeholders)!r}"
                  if each.variable.startswith("self.") else f"{each.variable} = {' '.join(each.placeholders)!r}" for each in wordings])  # fmt: skip


def _rows(
    path: Path, name: str, key: str, image: object, *, prompt: str = "prompt", below: str = "", **more: object
) -> None:
    """64 rows with a source image, which is made too."""
    _write(path, [json.dumps({prompt: text, key: image, **more}) for text in _numbered(name, 64)])
    first = image[0] if isinstance(image, list) else image
    file = path.parent / below / str(first["uri"] if isinstance(first, dict) else first)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(file)
