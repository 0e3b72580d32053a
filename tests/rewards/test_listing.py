"""The list of rewards: complete, made without a model, readable, and the same for machines."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rewards
from flowalign import cli
from rewards.__main__ import WIDTH, command, main
from rewards.listing import AS_SET, EXAMPLES, KINDS, OF_PARTS, OWN, entries, example, named, reward_classes

ROOT = Path(__file__).parents[2]


def test_no_reward_of_the_package_is_missing() -> None:
    """By the walk of the parameters' reference, which checks the contract itself."""
    choices = runpy.run_path(str(ROOT / "scripts" / "write_reference.py"))["choices"]
    names = {name for name, _ in choices(rewards, "Reward")}
    assert len(names) > 30 and {entry.name for entry in entries()} == names == set(reward_classes())


def test_every_example_is_of_a_reward_and_loads_nothing() -> None:
    code = "import sys; from rewards.listing import entries; entries(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"transformers", "open_clip", "rapidocr", "onnxruntime", "cv2", "flowalign"} & set(modules.split())
    assert set(EXAMPLES) <= set(reward_classes())


def test_a_reward_that_cannot_be_described_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(EXAMPLES, "MotionBand")
    with pytest.raises(
        ValueError, match=r"rewards\.MotionBand, which cannot be constructed .*'low'.*add its arguments to EXAMPLES"
    ):
        entries()


def test_each_kind_stands_together_and_what_is_known_is_the_spec() -> None:
    found = {entry.name: entry for entry in entries()}
    kinds = [entry.kind for entry in found.values()]
    assert list(dict.fromkeys(kinds)) == [kind for kind in KINDS if kind in kinds]
    clip, geneval, mix = found["CLIPScore"], found["GenEval"], found["Mix"]
    assert (clip.range, clip.differentiable, clip.memory) == ((-1, 1), True, "S")
    assert clip.checkpoint == "openai/clip-vit-large-patch14" and clip.kind == "image, by a network"
    assert geneval.checkpoint.startswith("facebook/mask2former") and geneval.memory == "M"
    assert found["JPEGCompressibility"].range == (None, 0) and found["JPEGCompressibility"].licence == OWN
    assert mix.reads == mix.licence == OF_PARTS and mix.channels == () and mix.kind == "made of other rewards"
    assert found["OnFrames"].reads == ("videos",) and found["OnFrames"].channels == OF_PARTS
    assert found["InWorker"].differentiable is False and found["WithTimeout"].differentiable == OF_PARTS
    assert found["FunctionReward"].channels == found["FunctionReward"].licence == AS_SET
    assert found["DeQA"].kind == "judges behind a chat endpoint" and found["DeQA"].memory == "XL"


@pytest.mark.parametrize("name", reward_classes())
def test_the_licence_of_what_loads_weights_is_of_both_code_and_weights(name: str) -> None:
    spec = example(name).spec
    if spec.checkpoint or spec.memory != "cpu":
        assert "code" in spec.licence and "weights" in spec.licence
    assert bool(spec.checkpoint) or spec.memory in ("cpu", "XL")  # XL: of a server


def test_the_table_is_narrow_and_has_a_line_per_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert command([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    head, first = lines[0], next(line for line in lines if line.startswith("CLIPScore "))
    assert first[head.index("range") :].startswith("[-1, 1]") and first[head.index("memory") :] == "S"
    assert {line.split()[0] for line in lines if line} >= set(reward_classes())
    assert command(["--wide"]) == 0
    assert "saturation, colorfulness" in capsys.readouterr().out


def test_one_reward_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["rewards.videoalign"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("rewards.VideoAlign: Three channels: visual quality VQ") and "VQ, MQ, TA" in text
    assert "KwaiVGI/VideoReward; Qwen/Qwen2-VL-2B-Instruct" in text and "weights Apache-2.0" in text


def test_the_list_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert command(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [row["name"] for row in rows] == [entry.name for entry in entries()]
    assert next(row["range"] for row in rows if row["name"] == "JPEGIncompressibility") == [0, None]
    low, high = example("JPEGIncompressibility").spec.range or (0, 0)
    assert (low, high) == (0, math.inf)


def test_an_unknown_name_or_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"got the reward 'PickScor'; .*did you mean PickScore"):
        named(["PickScor"])
    assert cli.rewards(["Clipscor"]) == 2
    said = capsys.readouterr().err
    assert "configuration error: flowalign rewards: got the reward 'Clipscor'" in said and "CLIPScore" in said
    assert cli.rewards(["--jsn"]) == 2 and "got --jsn; expected [NAME ...]" in capsys.readouterr().err


def test_both_commands_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.rewards([]) == 0
    ours = capsys.readouterr().out
    run = subprocess.run([sys.executable, "-m", "rewards"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (run.returncode, run.stdout) == (0, ours)
    assert main(["Mx"]) == 2 and capsys.readouterr().err.startswith("python -m rewards: got the reward 'Mx'")
