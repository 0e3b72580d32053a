"""VideoAlign on tiny files of the published layouts: frames, channels, LoRA."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardBatch, RewardError, RewardOutput, VideoAlign, score
from rewards.qwen.video_align import TOKENS, frame_numbers, gray, read_video_reward
from tests.helpers import tiny_qwen as tiny
from tests.helpers.qwen_by_hand import by_hand

PROMPTS = ["a cat runs", "two dogs sleep under a table"]
VIDEOS = torch.randint(0, 256, (2, 9, 3, 40, 75), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@cache
def made(layout: str = "whole", **settings: Any) -> VideoAlign:
    given = {**tiny.ARGUMENTS["VideoAlign"](), "model": str(tiny.video_reward(layout))}
    return VideoAlign(**{**given, **settings})


def scored(reward: VideoAlign, videos: Tensor = VIDEOS, fps: float = 4.5, prompts: list[str] = PROMPTS) -> RewardOutput:
    return score(reward, RewardBatch(prompts=prompts, videos=videos, fps=fps))


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_channels_are_those_of_transformers_written_out(positions: Any) -> None:
    state = read_video_reward(tiny.video_reward(), str(tiny.base()))
    texts = [f"V <|VQ_reward|>\nM <|MQ_reward|>\nT {prompt} <|TA_reward|>\n" for prompt in PROMPTS]
    seen = [[video[[0, 3, 5, 8]] / 255] for video in VIDEOS]  # 2 s, so 4 frames: 0, 2.7, 5.3, 8
    hidden = by_hand(state, "qwen2_vl", list(TOKENS), positions, seen, texts, "video")
    raw = hidden @ state["rm_head.weight"][0]
    expected = (raw - torch.tensor([3.6757, 1.1646, 2.8105])) / torch.tensor([2.2476, 1.3811, 2.5121])
    output = scored(made(positions=positions, rope="exact"))
    assert output.channels == ("VQ", "MQ", "TA")
    torch.testing.assert_close(output.scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.components["overall"], expected.sum(1), rtol=1e-4, atol=1e-5)
    overall = scored(made(positions=positions, rope="exact", output="overall"))
    torch.testing.assert_close(overall.scores[:, 0], expected.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(overall.components["MQ"], expected[:, 1], rtol=1e-4, atol=1e-5)


def test_dimensions_are_the_channels_or_what_is_summed() -> None:
    whole = scored(made()).scores
    swapped = scored(made(dimensions=("MQ", "VQ")))
    assert swapped.channels == ("MQ", "VQ") and torch.equal(swapped.scores, whole[:, [1, 0]])
    assert torch.equal(swapped.components["TA"], whole[:, 2]) and "MQ" not in swapped.components
    torch.testing.assert_close(swapped.components["overall"], whole[:, 0] + whole[:, 1])
    summed = scored(made(dimensions=("VQ", "MQ"), output="overall"))
    assert summed.channels == ("video_align",) and {"VQ", "MQ", "TA"} <= summed.components.keys()
    torch.testing.assert_close(summed.scores[:, 0], whole[:, 0] + whole[:, 1])
    for wrong in ((), ("VQ", "VQ"), ("AQ",)):
        with pytest.raises(ValueError, match="expected one or several of"):
            made(dimensions=wrong)
    with pytest.raises(ValueError, match="expected MQ among them"):
        made(dimensions=("VQ",), gray_motion=True)


def test_a_whole_peft_model_and_lora_beside_the_base_are_one_checkpoint() -> None:
    whole, lora = (read_video_reward(tiny.video_reward(layout), str(tiny.base())) for layout in ("whole", "lora"))
    assert whole.keys() == lora.keys() and all(torch.equal(whole[name], lora[name]) for name in whole)
    place = "language_model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(whole[place], tiny.body("qwen2_vl", tiny.ROWS, seed=0)[place])
    assert torch.equal(scored(made("whole")).scores, scored(made("lora")).scores)


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.video_reward("lora"), tmp_path / "lora"))
    (folder / "checkpoint-20" / "non_lora_state_dict.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-20 without model.pth and without \['non_lora_state_dict.pth'\]"
    ):
        read_video_reward(folder, str(tiny.base()))
    (folder / "model_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"without checkpoint-<step> or model_config\.json"):
        read_video_reward(folder, str(tiny.base()))


def test_frames_by_hand() -> None:
    for frames, fps, expected in (
        (24, 24, [0, 8, 15, 23]),  # 1 s: 2 frames, but at least 4
        (9, 4.5, [0, 3, 5, 8]),
        (5, 1, [0, 1, 3, 4]),
        (3, 24, [0, 2]),  # a short video: its even part
    ):
        assert frame_numbers(frames, fps, 2.0) == expected
    for frames, fps, sample_fps, count in ((81, 16, 2.0, 10), (81, 16, 8.0, 40), (5000, 1, 2.0, 768)):
        found = frame_numbers(frames, fps, sample_fps)
        assert len(found) == count and found[0] == 0 and found[-1] == frames - 1
    assert all(len(frame_numbers(count, 8, 2.0)) % 2 == 0 for count in range(2, 100))
    with pytest.raises(ValueError, match="got videos of 1 frame; expected at least 2"):
        frame_numbers(1, 8, 2.0)


def test_the_fps_of_the_video_choose_the_frames() -> None:
    slow, fast = scored(made(), fps=2.0).scores, scored(made(), fps=4.5).scores
    assert float((slow - fast).abs().min()) > 1e-5
    picked = VIDEOS[:, frame_numbers(9, 4.5, 2.0)]
    torch.testing.assert_close(scored(made(), picked, fps=2.0).scores, fast)
    with pytest.raises(RewardError, match="got videos of 1 frame"):
        scored(made(), VIDEOS[:, :1])


def test_only_text_alignment_reads_the_prompt() -> None:
    one, other = scored(made()).scores, scored(made(), prompts=["a car", "a house"]).scores
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert float((one[:, 2] - other[:, 2]).abs().min()) > 1e-4


def test_gray_motion_changes_motion_quality_only() -> None:
    color, motion = scored(made()).scores, scored(made(gray_motion=True)).scores
    assert torch.equal(color[:, [0, 2]], motion[:, [0, 2]])
    torch.testing.assert_close(motion[:, 1], scored(made(), gray(VIDEOS / 255)).scores[:, 1])
    assert float((color[:, 1] - motion[:, 1]).abs().min()) > 1e-5


def test_constants_are_settings() -> None:
    raw = scored(made(mean=(0, 0, 0), std=(1, 1, 1))).scores
    shifted = scored(made(mean=(1, 2, 3), std=(2, 2, 4))).scores
    torch.testing.assert_close(shifted, (raw - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 2.0, 4.0]))
    for settings in ({"std": (1, 0, 1)}, {"mean": (1, 2)}, {"sample_fps": 0.0}):
        with pytest.raises(ValueError, match="expected three numbers each"):
            made(**settings)
    with pytest.raises(ValueError, match="got output='sum'"):
        made(output="sum")


def test_other_ranges_are_refused() -> None:
    with pytest.raises(RewardError, match=r"got videos in -1..1; expected \[0, 1\]"):
        scored(made(), VIDEOS.float() / 127.5 - 1)
