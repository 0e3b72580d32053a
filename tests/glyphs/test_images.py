"""The images of Glyphs that scripts/make_glyphs_images.py writes are what the trainers on files read."""

import runpy
from pathlib import Path

import pytest
import torch

from flowalign.glyphs import parse_prompt, train_prompts
from flowalign.glyphs.renderer import JITTER, render
from flowalign.image_sets import load_labeled, load_pairs
from flowalign.media import read_image
from rewards import RewardBatch, RewardOutput
from tests.helpers.plain_rewards import Plain

MAIN = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_glyphs_images.py"))["main"]
PROMPTS = [record["prompt"] for record in train_prompts()[:3]]


def judged(batch: RewardBatch) -> RewardOutput:
    """The brightness of an image, in place of what OCR reads; of the first prompt all are equally good."""
    assert batch.images is not None
    scores = batch.images.mean((1, 2, 3)) * (0.0 if batch.prompts[0] == PROMPTS[0] else 1.0)
    return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


def test_pairs_and_renderings_are_sets_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"train_prompts": lambda: train_prompts()[:3], "OCR": lambda **_: Plain(judged), "GAP": 1e-6}
    for name, value in changes.items():
        monkeypatch.setitem(MAIN.__globals__, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    MAIN(["--output", str(tmp_path), "--samples", "2"])

    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    assert [pair.record.prompt for pair in pairs] == PROMPTS[1:]
    for pair in pairs:
        chosen, rejected = (read_image(path).mean() for path in pair.files)
        assert chosen > rejected

    rendered = load_labeled(str(tmp_path / "rendered.jsonl"))
    assert [row.record.prompt for row in rendered] == PROMPTS
    places = torch.cartesian_prod(*[torch.arange(-JITTER, JITTER + 1)] * 2)
    for row in rendered:
        word, ink, paper = ([part] * len(places) for part in parse_prompt(row.record.prompt))
        gaps = (render(word, ink, paper, places) - read_image(row.image)).abs().flatten(1).amax(1)
        assert float(gaps.min()) < 1 / 255  # at one of the places; a PNG has 256 levels
