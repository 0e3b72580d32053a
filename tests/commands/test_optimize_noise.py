"""`flowalign optimize-noise`: what it writes, and what it refuses before a model is loaded."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowalign import cli
from flowalign.noise_optimization import read_noise
from flowalign.testing import tiny_pipeline

PROMPT = 'the word "KITE" in red on a yellow background'
CLIP = "configs/rewards/clip_glyphs.yaml"
PROMPTS = "flowalign.glyphs:held_out_prompts"


def test_it_writes_the_images_that_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ocr = '{"class_path": "rewards.OCR", "init_args": {"target": "quotes"}}'
    arguments = ["glyphs-1step", PROMPT, "--rewards", CLIP, "--held-out", ocr, "--steps", "3", "--output"]
    assert cli.optimize_noise([*arguments, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(tmp_path / "a") and said[-2].startswith(f"{PROMPT}: 0.")
    assert ", ocr " in said[-2]
    found = json.loads((tmp_path / "a" / "result.json").read_text())
    assert found["total"][0] >= found["first_total"][0] and found["evaluations"] == 3
    assert cli.optimize_noise([*arguments, str(tmp_path / "b"), "--start", str(tmp_path / "a"), "--checkpoint"]) == 0
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert again["first_total"][0] == pytest.approx(found["total"][0], abs=1e-5)
    assert read_noise(tmp_path / "b").shape == (1, 3, 24, 48)
    assert cli.optimize_noise([*arguments, str(tmp_path / "a")]) == 2 and "an earlier result" in capsys.readouterr().err


def test_a_run_is_a_model_and_prompts_may_come_from_a_file(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na hare\nan owl\n")
    arguments = [str(finished_run), "--prompts", str(tmp_path / "prompts.txt"), "--count", "2"]
    rewards = ["--rewards", "rewards.JPEGCompressibility", "rewards.JPEGIncompressibility", "--weights", "1", "3"]
    method = ["--method", "zero-order", "--steps", "2", "--output", str(tmp_path / "out")]
    assert cli.optimize_noise([*arguments, *rewards, *method]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["prompts"] == ["a fox", "a hare"]
    history = {name: torch.tensor(rows) for name, rows in found["history"].items()}
    expected = history["jpeg_compressibility"] + 3 * history["jpeg_incompressibility"]
    torch.testing.assert_close(history["total"], expected)


def test_a_pipeline_in_the_size_and_dtype_that_are_named(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "flux")
    tiny_pipeline("flux1_schnell").save_pretrained(model)
    arguments = [
        PROMPT,
        "--rewards",
        "rewards.JPEGCompressibility",
        "--method",
        "best-of-n",
        "--steps",
        "1",
        "--dtype",
        "bf16",
    ]
    assert cli.optimize_noise([model, *arguments, "--size", "32x64", "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "image.png") as image:
        assert image.size == (64, 32)
    fp32 = [*arguments[:-1], "fp32", "--size", "32x64", "--output", str(tmp_path / "exact")]
    assert cli.optimize_noise([model, *fp32]) == 0
    first, second = (json.loads((tmp_path / name / "result.json").read_text())["total"][0] for name in ("out", "exact"))
    assert first != second and first == pytest.approx(second, rel=0.05)
    assert cli.optimize_noise([str(finished_run), *arguments]) == 2
    assert "none for a run, which has its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["glyphs-1step", PROMPT], "and 0 rewards; expected texts or --prompts"),
        (["glyphs-1step", "--rewards", CLIP], "got 0 prompts"),
        (["glyphs-1step", PROMPT, "--prompts", "a.txt", "--rewards", CLIP], "got 1 prompts"),
        (["glyphs-1step", "--prompts", "no.txt", "--rewards", CLIP], "no.txt does not exist"),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--weights", "1", "2"], "got 2 --weights for 1 --rewards"),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--method", "adam"], "expected one of gradient, spsa"),
        (["glyphs-1step", PROMPT, "--rewards", "rewards.OCR"], "ocr, which has no gradient, with Gradient"),
        (
            ["glyphs-1step", PROMPT, "--rewards", CLIP, "--learning-rate", "2", "--method", "spsa"],
            "with gradient alone",
        ),
        (["glyphs-1step", "--prompts", CLIP, "--rewards", CLIP, "--output", CLIP], "expected another folder"),
        (["glyphs-1step", "--prompts", PROMPTS, "--count", "-1", "--rewards", CLIP], "got --count -1; expected 1 to"),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--device", "banana"], "expected cpu, cuda or cuda:N"),
        (["glyphs", PROMPT, "--rewards", CLIP, "--size", "24"], "got --size 24; expected HEIGHTxWIDTH"),
        (["glyphs", PROMPT, "--rewards", CLIP, "--size", "25x48"], "got image size 25×48"),
        (
            ["glyphs", PROMPT, "--rewards", CLIP, "--dtype", "fp16"],
            "got --dtype fp16 for glyphs; expected fp32 or bf16",
        ),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--start", "nowhere"], "expected the folder of a saved result"),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--stesp", "2"], "got --stesp 2"),
        (["glyphs-1step", PROMPT, "--rewards", CLIP, "--steps", "0"], "expected at least 1 of each"),
        (["no/such/folder", PROMPT, "--rewards", CLIP], "no/such/folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.optimize_noise(arguments) == 2
    assert match in capsys.readouterr().err


def test_a_reward_that_fails_is_a_sentence_that_promises_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fails.py").write_text("def boom(images, prompts):\n    raise RuntimeError('no')\n")
    arguments = ["glyphs-1step", PROMPT, "--rewards", "./fails.py:boom", "--method", "best-of-n", "--steps", "1"]
    assert cli.optimize_noise(arguments) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: no; nothing was saved" in said and "checkpoint" not in said
    assert not Path("runs").exists()
