"""A run folder read again: `fa.load_run`, `flowalign export`, `flowalign report`, and a LoRA to start from."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

import flowalign as fa
from flowalign import cli
from flowalign.data import load_prompts
from flowalign.errors import ConfigError
from flowalign.evaluation.result_file import load_result
from flowalign.models import Policy, load_policy
from flowalign.storage import checkpoint
from rewards import JPEGCompressibility
from tests.helpers.tiny_run import run_it


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two iterations with an average; it keeps both checkpoints."""
    output = tmp_path_factory.mktemp("run")
    run_it(tiny_pipeline, output, "run.ema_decay=0.5", "run.iterations=2", "evaluation.guidance_scale=2.0")
    return output / "tiny"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "tiny")
    return tmp_path / "tiny"


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in policy.parameters_of("policy")}


def test_a_loaded_run_evaluates_as_the_run_did(run: Path) -> None:
    policy = fa.load_run(run)
    tuned = load_result(run / "evaluation" / "tuned.safetensors")
    prompts = load_prompts("flowalign.glyphs:held_out_prompts")[:4]
    again = fa.evaluate(policy, prompts, [JPEGCompressibility()], seed=tuned.seed, batch_size=64)
    assert (again.num_inference_steps, again.guidance_scale) == (2, 2.0)
    assert torch.equal(again.pixels, tuned.pixels)
    assert all(torch.equal(again.scores[name], values) for name, values in tuned.scores.items())


def test_a_loaded_run_needs_neither_its_reward_nor_its_prompts(copy: Path) -> None:
    plain = yaml.safe_load((copy / "config.yaml").read_text())
    plain["reward"], plain["prompts"] = "gone.Reward", "gone.txt"
    (copy / "config.yaml").write_text(yaml.safe_dump(plain))
    assert fa.load_run(copy).generate(["a fox"], seed=1).pixels.shape == (1, 3, 24, 48)


@pytest.mark.parametrize(
    ("step", "ema", "section"),
    [(None, None, "ema"), (1, None, "ema"), (1, False, "role_policy"), (2, True, "ema")],
)
def test_step_and_average_are_those_that_are_asked_for(
    step: int | None, ema: bool | None, section: str, run: Path
) -> None:
    tensors, _ = checkpoint.load(run / "checkpoints" / f"step-{step or 2}")
    loaded = weights(fa.load_run(run, step=step, ema=ema))
    assert all(torch.equal(loaded[name], value) for name, value in tensors[section].items())


@pytest.mark.parametrize(
    ("arguments", "folder", "section"),
    [([], "lora", "ema"), (["--step", "1"], "lora-step-1-ema", "ema"), (["--no-ema"], "lora-step-2", "role_policy")],
)
def test_export_writes_the_lora_of_a_checkpoint(
    arguments: list[str], folder: str, section: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "lora")
    assert cli.export([str(copy), *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(copy / folder)
    saved = load_file(copy / folder / "adapter_model.safetensors")
    step = 1 if "1" in arguments else 2
    tensors, _ = checkpoint.load(copy / "checkpoints" / f"step-{step}")
    for name, value in tensors[section].items():
        assert torch.equal(saved[f"base_model.model.{name}".replace(".default", "")], value)


def test_an_export_equals_what_the_run_wrote(copy: Path, run: Path) -> None:
    shutil.rmtree(copy / "lora")
    assert cli.export([str(copy)]) == 0
    for file in (run / "lora").glob("*.safetensors"):
        ours, theirs = load_file(copy / "lora" / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_full_weights_are_exported_as_folders_of_diffusers(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["policy.trainable=full", "trainer.regularizers={}", "run.iterations=2", "evaluation.count=2"]
    run_it(tiny_pipeline, tmp_path, *full)
    folder = tmp_path / "tiny"
    assert not (folder / "lora").exists()
    for step, name in ((2, "networks"), (1, "networks-step-1")):
        if step == 1:
            capsys.readouterr()
            assert cli.export([str(folder), "--step", "1"]) == 0
            assert capsys.readouterr().out.strip() == str(folder / name)
        made = dict(SD3Transformer2DModel.from_pretrained(folder / name / "transformer").named_parameters())
        trained = weights(fa.load_run(folder, step=step))
        assert made.keys() == trained.keys() and all(torch.equal(made[key], trained[key]) for key in made)


def test_a_report_is_written_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert cli.report([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (cli.export, ["--step", "7"], r"got step 7 .* it keeps: \[1, 2\]"),
        (cli.export, ["--step", "x"], "invalid int value"),
        (cli.export, ["--stepp", "1"], "got --stepp 1; expected RUN"),
        (cli.report, ["more"], "expected one run folder"),
    ],
)
def test_what_a_run_does_not_hold_is_said(command, arguments, message, run, capsys) -> None:
    assert command([str(run), *arguments]) == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_what_is_no_run_is_said(run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    copy.rename(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"got tiny, which is no run folder.* did you mean .*runs/tiny\?"):
        fa.load_run("tiny")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        fa.load_run("runs/tiny")


# ------------------------------------------------------------------------------------------ a LoRA to start from


@pytest.mark.parametrize("place", ["", "lora", "lora/pytorch_lora_weights.safetensors"])
def test_a_policy_takes_the_lora_of_a_run(place: str, run: Path, tiny_pipeline: Path) -> None:
    expected = weights(fa.load_run(run))
    loaded = weights(load_policy(str(tiny_pipeline), lora=str(run / place)))
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_run_starts_from_the_lora_of_another(
    run: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    run_it(
        tiny_pipeline, tmp_path, "policy.lora.init=~/tiny", "run.iterations=1", "trainer.optimizer.lr=1e-30",
        "run.gradient_check=false",
    )  # fmt: skip
    started, expected = weights(fa.load_run(tmp_path / "tiny")), weights(fa.load_run(run))
    for name, value in expected.items():
        torch.testing.assert_close(started[name], value, rtol=0, atol=1e-7)


def test_what_is_no_lora_is_said(run: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file and holds no .* flowalign export RUN"):
        load_policy(str(tiny_pipeline), lora=str(run / "checkpoints"))
