"""`flowalign evaluate`: what its arguments ask for, by default as the first run evaluates, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from flowalign import cli
from flowalign.commands import evaluate as command
from flowalign.models import Size
from rewards import OCR, CLIPScore, InWorker, JPEGCompressibility
from rewards.remote.description import fingerprint


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, str], list[Any], list[Any], dict[str, Any]]]:
    """The calls of evaluate_columns, which measures nothing."""
    calls: list[tuple[dict[str, str], list[Any], list[Any], dict[str, Any]]] = []

    def evaluate_columns(columns: dict[str, str], prompts: list[Any], rewards: list[Any], **settings: Any) -> None:
        calls.append((columns, prompts, rewards, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_columns", evaluate_columns)
    return calls


def test_a_run_says_what_is_not_said(asked: list[Any], finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.evaluate([str(finished_run)]) == 130
    assert "finished parts are in runs/evaluations/tiny, and the same command goes on" in capsys.readouterr().err
    [(columns, prompts, rewards, settings)] = asked
    assert columns == {"base": "base", "tiny": str(finished_run)}
    assert len(prompts) == 4 and rewards == [JPEGCompressibility()]  # it is trained on that, too
    assert (settings["seed"], settings["samples_per_prompt"], settings["batch_size"]) == (1234, 1, 64)
    assert settings["num_inference_steps"] is None and settings["size"] is None  # as the run has them


def test_what_is_said_counts(asked: list[Any], finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na hare\nan owl\n")
    arguments = [
        "old=" + str(finished_run) + "@1:raw", str(finished_run), "--no-base", "--prompts", str(tmp_path / "prompts.txt"), "--count",
        "2", "--samples", "3", "--seed", "5", "--steps", "7", "--guidance", "2.5", "--size", "48x48", "--batch-size", "9", "--output",
        str(tmp_path / "out"), "--rewards", "rewards.OCR", "tests.run.test_evaluate_columns:darkness", "configs/rewards/ocr_glyphs.yaml",
    ]  # fmt: skip
    assert cli.evaluate(arguments) == 130
    [(columns, prompts, rewards, settings)] = asked
    assert columns == {"old": f"{finished_run}@1:raw", "tiny": str(finished_run)}
    assert [record.prompt for record in prompts] == ["a fox", "a hare"]
    assert [reward.name for reward in rewards] == ["ocr", "darkness", "ocr_exact", "ocr_training"]
    assert rewards[2].fold == {"0": "O"} and rewards[3].reward.metric == "edit"  # of the file's `reward`
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["size"]) == (7, 2.5, Size(48, 48))
    assert (settings["samples_per_prompt"], settings["seed"], settings["batch_size"]) == (3, 5, 9)
    assert settings["output"] == tmp_path / "out"


def test_a_file_says_where_a_reward_lives(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "judges.yaml").write_text(
        "policy: {path: nowhere}\nevaluation:\n  rewards:\n    - {class_path: rewards.OCR, init_args: {metric: soft}, place: worker}\n"
    )
    assert cli.evaluate(["glyphs", "--rewards", str(tmp_path / "judges.yaml")]) == 130
    [(columns, prompts, [reward], _)] = asked
    assert columns == {"glyphs": "glyphs"} and len(prompts) == 256
    assert isinstance(reward, InWorker) and reward.name == "ocr"


def test_glyphs_alone_and_the_pipeline_of_a_run_that_is_named(
    asked: list[Any], finished_run: Path, tiny_pipeline: Path
) -> None:
    assert cli.evaluate(["glyphs"]) == cli.evaluate([str(tiny_pipeline), str(finished_run)]) == 130
    (columns, prompts, rewards, settings), (named, *_) = asked
    assert columns == {"glyphs": "glyphs"} and len(prompts) == 256
    assert settings["output"] == Path("runs/evaluations/glyphs")
    expected = [OCR(metric="exact", fold={"0": "O"}, name="ocr_exact"), CLIPScore(model="glyphs")]
    assert [fingerprint(reward) for reward in rewards] == [fingerprint(reward) for reward in expected]
    assert named == {"sd3": str(tiny_pipeline), "tiny": str(finished_run)}  # base is there already


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "got no model"),
        (["RUN", "--sed", "3"], "got --sed"),
        (["RUN", "--count", "many"], "invalid int value"),
        (["RUN", "--count", "0"], "got --count 0; expected at least 1"),
        (["RUN", "--count", "100000"], "expected at most the"),
        (["RUN", "--prompts", "none.txt"], "none.txt does not exist"),
        (["RUN", "--rewards", "rewards.None"], "rewards.None"),
        (["RUN", "--rewards", "none.yaml"], "none.yaml"),
        (["RUN", "--size", "512"], "got --size 512; expected HEIGHTxWIDTH"),
        (["RUN", "--size", "25x48"], "got image size 25×48"),
        (["RUN", "--steps", "0"], "got --steps 0"),
        (["RUN", "--guidance", "0.5"], "guidance_scale=0.5"),
        (["RUN", "RUN"], "two columns named tiny"),
        (["RUN@9"], "got step 9"),
        (["nowhere/at/all"], "no run folder"),
        (["PIPELINE"], "expected --prompts SOURCE and --rewards REWARD"),
        (["PIPELINE", "--prompts", "flowalign.glyphs:held_out_prompts", "--rewards", "rewards.OCR", "--size", "24x48"],
         "got no num_inference_steps, guidance_scale"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence_before_a_model_is_loaded(
    arguments: list[str], message: str, finished: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowalign.run.places.Place.load", None)
    words = {"RUN": str(finished / "tiny"), "PIPELINE": str(tiny_pipeline)}
    replaced = [each.replace("RUN", words["RUN"]).replace("PIPELINE", words["PIPELINE"]) for each in arguments]
    assert cli.evaluate(replaced) == 2
    assert message in capsys.readouterr().err


def test_a_table_and_the_paths_are_printed(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.evaluate([str(finished_run), "--samples", "2", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "2 models × 4 prompts × 2 samples = 16 images; 32 network evaluations to do (2 steps)" in text
    assert "jpeg_compressibility (trained on)" in text and "\n  base  -" in text and " %\n" in text
    figures = json.loads((output / "metrics.json").read_text())
    gain = figures["gain"]["tiny"]["jpeg_compressibility"]
    assert f"{gain['gain']:+.4g}" in text and f"wins {100 * gain['win_rate']:.0f} %" in text
    assert f"{output / 'grid.png'}\n" in text and len(list((output / "images" / "tiny").iterdir())) == 8
    assert cli.evaluate([str(finished_run), "--samples", "2", "--output", str(output)]) == 0
    assert "16 of them are there; 0 network evaluations to do" in capsys.readouterr().out
