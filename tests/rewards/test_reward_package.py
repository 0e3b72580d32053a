"""The package from outside: cheap to import, a leaf, and buildable from YAML by import path."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

import rewards


def test_import_is_cheap_and_points_nowhere():
    code = "import sys, rewards; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    heavy = {"cv2", "onnxruntime", "rapidocr", "transformers", "diffusers", "matplotlib", "flowalign", "samplers"}
    assert heavy & set(result.stdout.split()) == set()
    assert rewards.PART_OF == "flowalign"


def built(text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=rewards.Reward)
    return parser.instantiate(parser.parse_object({"reward": yaml.safe_load(text)})).reward


def test_yaml_builds_rewards_by_import_path(tmp_path):
    (tmp_path / "my_rewards.py").write_text("def shininess(images, prompts): ...")
    mix = built(f"""
class_path: rewards.Mix
init_args:
  rewards:
    - class_path: rewards.OCR
      init_args:
        metric: soft
        fold: {{"0": "O"}}
        recognizer: {{class_path: rewards.RapidReader, init_args: {{workers: 2}}}}
    - class_path: rewards.ColorAccuracy
      init_args: {{palette: {{red: [200, 0, 0], white: [255, 255, 255]}}}}
    - class_path: rewards.FunctionReward
      init_args: {{path: "{tmp_path}/my_rewards.py:shininess"}}
    - class_path: rewards.JPEGCompressibility
      init_args: {{divide_by: 500}}
  weights: [1, 0.5, 0.1, 2]
""")
    assert [part.name for part in mix.rewards] == ["ocr", "color", "shininess", "jpeg_compressibility"]
    assert mix.rewards[0].recognizer.workers == 2 and mix.rewards[0].fold == {"0": "O"}
    assert mix.rewards[1].palette["red"] == (200, 0, 0) and mix.weights == [1, 0.5, 0.1, 2]


def test_yaml_builds_pretrained_rewards_without_loading_them():
    picked = built("{class_path: rewards.PickScore, init_args: {scale: logit_over_26, dtype: bf16, batch_size: 8}}")
    expected = rewards.PickScore(scale="logit_over_26", dtype="bf16", batch_size=8)
    assert repr(picked) == repr(expected) and picked.scorer is None
    for name in ("Aesthetic", "CLIPScore", "HPSv2", "ImageReward"):
        assert built(f"rewards.{name}").spec.differentiable


def test_yaml_builds_rewards_of_rewards():
    channels = built("""
class_path: rewards.Channels
init_args:
  rewards:
    - class_path: rewards.Ensemble
      init_args:
        how: uwo
        coef: 0.2
        rewards:
          - {class_path: rewards.Standardized, init_args: {reward: rewards.JPEGCompressibility, loc: -40, scale: 5}}
          - {class_path: rewards.Capped, init_args: {high: 0.9, reward: {class_path: rewards.OCR, init_args: {metric: f1}}}}
    - class_path: rewards.Augmented
      init_args: {views: 3, reward: {class_path: rewards.ImageStatistics, init_args: {statistics: [edges]}}}
    - {class_path: rewards.GroupDiversity, init_args: {features: {class_path: rewards.Thumbnail, init_args: {size: 8}}}}
    - {class_path: rewards.GenEval, init_args: {detector: rewards.Mask2Former, colors: rewards.CLIPColors, metric: strict}}
""")
    ensemble, augmented, diversity, geneval = channels.rewards
    assert ensemble.coef == 0.2 and [part.name for part in ensemble.rewards] == ["jpeg_compressibility", "ocr"]
    assert augmented.reward.statistics == ("edges",) and diversity.features.size == 8
    assert geneval.detector.short_side == 800 and geneval.colors.model == "ViT-L-14-quickgelu"
    gated = built("""
class_path: rewards.Gated
init_args:
  reward: {class_path: rewards.OnFrames, init_args: {frames: 4, reduce: min, reward: rewards.OCR}}
  gate: {class_path: rewards.MotionBand, init_args: {low: 0.1, high: 1}}
  threshold: 0.5
""")
    assert gated.reward.frames == 4 and gated.spec.inputs == ("videos",) and not gated.spec.differentiable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{class_path: rewards.OCR, init_args: {metrc: edit}}", "metrc"),
        ("{class_path: rewards.OCR, init_args: {metric: edt}}", "edt"),
        ("{class_path: rewards.Line, init_args: {text: a, confidence: 1}}", "protocol Reward"),
        ("{class_path: rewards.OCRR}", "OCRR"),
        ("{class_path: rewards.HPSv2, init_args: {version: v3}}", "v3"),
        ("{class_path: rewards.HPSv2, init_args: {scorer: null}}", "scorer"),
        ("{class_path: rewards.OnFrames, init_args: {frames: some, reward: rewards.OCR}}", "some"),
    ],
)
def test_yaml_mistakes_are_errors(text, message):
    with pytest.raises(ArgumentError, match=message):
        built(text)
