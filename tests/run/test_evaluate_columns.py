"""Several models in one call: the same as one by one, in parts that are made once, whatever stops it or however many make them."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import flowalign as fa
from flowalign.data import load_prompts
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.evaluation import parts
from flowalign.evaluation.image_files import write_image
from flowalign.evaluation.result_file import load_result
from flowalign.models import Policy
from flowalign.run import evaluate_columns as module
from flowalign.run.places import Place, column_name
from flowalign.storage.files import DamagedFile
from rewards import GroupDiversity, ImageStatistics, JPEGCompressibility, JPEGIncompressibility, Mix, RewardError
from tests.helpers.files import contents

PROMPTS = load_prompts("flowalign.glyphs:held_out_prompts")[:5]
QUIET: dict[str, Any] = {"progress": False, "batch_size": 3}


def darkness(images: Tensor, prompts: list[str]) -> Tensor:
    return 1 - images.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CHUNK", 2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each batch had that was generated."""
    counts: list[int] = []
    original = parts.generate_and_score

    def counted(*arguments: Any) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for images, scores in original(*arguments):
            counts.append(len(images))
            yield images, scores

    monkeypatch.setattr(parts, "generate_and_score", counted)
    return counts


def test_columns_are_what_each_model_gives_alone(finished_run: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    places = {"base": "base", "tuned": str(finished_run), "mine": fa.load_policy(str(tiny_pipeline), trainable="none")}
    rewards = [JPEGCompressibility(), GroupDiversity()]
    evaluation = fa.evaluate_columns(places, PROMPTS, rewards, seed=7, samples_per_prompt=2, **QUIET)
    assert list(evaluation.columns) == ["base", "tuned", "mine"] and evaluation.trained == {"jpeg_compressibility"}
    policy = fa.load_run(finished_run)
    alone = fa.evaluate(policy, PROMPTS, rewards, seed=7, samples_per_prompt=2, batch_size=2)
    tuned = evaluation.columns["tuned"]
    assert (tuned.uids, tuned.prompts, tuned.digest) == (alone.uids, alone.prompts, alone.digest)
    assert (tuned.num_inference_steps, tuned.guidance_scale) == (2, 1.0) and tuned.evaluations_per_image == 2
    assert torch.equal(tuned.pixels, alone.pixels) and list(tuned.scores) == list(alone.scores)
    assert all(torch.equal(tuned.scores[name], values) for name, values in alone.scores.items())
    base, mine = evaluation.columns["base"], evaluation.columns["mine"]
    assert torch.equal(base.pixels, mine.pixels) and not torch.equal(base.pixels, tuned.pixels)
    assert evaluation.sources == {
        "base": str(tiny_pipeline),
        "tuned": "tiny, iteration 1",
        "mine": "a policy in memory",
    }


def test_the_base_is_that_of_the_run_itself(finished_run: Path) -> None:
    own = load_result(finished_run / "evaluation" / "base.safetensors")
    evaluation = fa.evaluate_columns(
        {"base": "base", "a": finished_run}, PROMPTS[:4], [JPEGCompressibility()], seed=own.seed, **QUIET
    )
    torch.testing.assert_close(evaluation.columns["base"].images, own.images, rtol=0, atol=1.001 / 255)
    assert evaluation.columns["base"].digest == own.digest


def test_the_folder_holds_images_in_full_resolution_scores_and_figures(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowalign.evaluation.evaluate.IMAGE_BYTES", 5 * 24 * 48 * 3 // 4)
    evaluation = fa.evaluate_columns(
        {"base": "base", "a": finished_run},
        PROMPTS,
        [JPEGCompressibility(), darkness],
        output=tmp_path / "out",
        **QUIET,
    )
    out, result = tmp_path / "out", evaluation.columns["a"]
    assert result.pixels.shape == (5, 3, 12, 24)  # reduced, the files are not
    with Image.open(out / "images" / "a" / "3-0.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    assert pixels.shape == (3, 24, 48)
    assert float(1 - pixels.mean()) == pytest.approx(float(result.scores["darkness"][3]), abs=0.5 / 255)
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["column"] for row in rows] == ["base"] * 5 + ["a"] * 5 and rows[8]["prompt"] == PROMPTS[3].prompt
    assert float(rows[8]["darkness"]) == float(result.scores["darkness"][3])
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["columns"] == ["base", "a"] and figures["trained"] == ["jpeg_compressibility"]
    assert figures["mean"]["a"]["darkness"] == pytest.approx(float(result.scores["darkness"].mean()))
    bright = ImageStatistics(("brightness",))(parts_batch(out / "images" / "a")).scores.mean()
    assert figures["monitors"]["a"]["brightness"] == pytest.approx(float(bright), abs=1e-6)
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 2 * 288 and grid.size[1] > 24 * 12


def parts_batch(folder: Path) -> Any:
    images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(folder.glob("*.png"))]
    return fa.RewardBatch(prompts=[""] * len(images), images=torch.stack(images).float() / 255)


def test_an_interrupted_evaluation_goes_on_without_making_a_part_again(
    finished_run: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts of two, two and one prompts; the second column is stopped while its second part is written."""
    columns = {"base": "base", "a": str(finished_run)}
    fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "whole", **QUIET)
    assert sum(made) == 10
    written: list[Path] = []

    def interrupted(path: Path, pixels: Tensor, fps: float | None) -> None:
        written.append(path)
        if len(written) == 9:
            raise KeyboardInterrupt
        write_image(path, pixels, fps)

    made.clear()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(parts, "write_image", interrupted)
        fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "out", **QUIET)
    assert sum(made) == 9 and not (tmp_path / "out" / "metrics.json").exists()
    fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "out", **QUIET)
    assert sum(made) == 9 + 2 + 1  # the part that was not finished, and the last one
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "out", **QUIET)
    assert sum(made) == 12


def test_a_generator_of_few_steps_is_refused_on_other_levels() -> None:
    """Columns are made alike, as the first one samples: the others may not know those levels."""
    columns = {"base": "glyphs", "few": "glyphs-4step"}
    with pytest.raises(
        ConfigError, match=r"got glyphs-4step in 6 steps on the grid.*expected 4 on PlainShift\(k=3\.0\)"
    ):
        fa.evaluate_columns(columns, PROMPTS[:2], [darkness], **QUIET)
    alike = fa.evaluate_columns({"few": "glyphs-4step", "base": "glyphs"}, PROMPTS[:2], [darkness], **QUIET)
    assert {result.num_inference_steps for result in alike.columns.values()} == {4}


def test_two_processes_make_every_part_once(
    finished_run: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, the second first; together they leave what one process does."""
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    columns = {"base": "base", "a": str(finished_run)}
    fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "one", **QUIET)
    made.clear()
    original = module.missing_parts
    found: list[Any] = []

    def at_the_start(*arguments: Any) -> Any:
        found.append(original(*arguments))
        return found[0]

    monkeypatch.setattr(module, "missing_parts", at_the_start)
    for rank in (1, 0):
        everyone = Processes(rank, 2)
        with contextlib.suppress(DamagedFile):  # the parts of the other are not there yet
            fa.evaluate_columns(columns, PROMPTS, [darkness], output=tmp_path / "two", processes=everyone, **QUIET)
    assert sum(made) == 10 and contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_lost_image_is_made_again_and_a_damaged_part_is_named(
    finished_run: Path, tmp_path: Path, made: list[int]
) -> None:
    call: dict[str, Any] = {"output": tmp_path / "out", **QUIET}
    fa.evaluate_columns({"a": finished_run}, PROMPTS, [darkness], **call)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "images" / "a" / "2-0.png").unlink()
    made.clear()
    fa.evaluate_columns({"a": finished_run}, PROMPTS, [darkness], **call)
    assert sum(made) == 2 and contents(tmp_path / "out") == before
    damaged = tmp_path / "out" / "parts" / "a" / "chunk-1.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DamagedFile, match="chunk-1"):
        fa.evaluate_columns({"a": finished_run}, PROMPTS, [darkness], **call)


@pytest.mark.slow
def test_a_kill_leaves_whole_parts_only(finished_run: Path, tmp_path: Path, made: list[int]) -> None:
    code = (
        "import sys, os, signal; import flowalign as fa; from flowalign.evaluation import parts; parts.CHUNK = 2\n"
        "from tests.run.test_evaluate_columns import PROMPTS, darkness\n"
        "save = parts.save\n"
        "def killed(*arguments, **options):\n"
        "    if len(list(__import__('pathlib').Path(sys.argv[2]).rglob('*.safetensors'))) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return save(*arguments, **options)\n"
        "parts.save = killed\n"
        "fa.evaluate_columns({'a': sys.argv[1]}, PROMPTS, [darkness], output=sys.argv[2], progress=False, batch_size=3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished_run), str(tmp_path / "out")], cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    fa.evaluate_columns({"a": finished_run}, PROMPTS, [darkness], output=tmp_path / "out", **QUIET)
    assert sum(made) == 1  # the last prompt
    fa.evaluate_columns({"a": finished_run}, PROMPTS, [darkness], output=tmp_path / "whole", **QUIET)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_of_other_settings_are_never_mixed(
    finished_run: Path, tiny_pipeline: Path, tmp_path: Path, made: list[int]
) -> None:
    rewards = [JPEGCompressibility()]
    fa.evaluate_columns({"a": finished_run}, PROMPTS, rewards, output=tmp_path, **QUIET)
    made.clear()
    for changed, what in (({"seed": 5}, "seed"), ({"num_inference_steps": 3}, "steps"), ({"guidance_scale": 2.0}, "guidance"),
                          ({"samples_per_prompt": 2}, "samples per prompt"), ({"size": fa.Size(48, 48)}, "size")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"got another {what} for the column a"):
            fa.evaluate_columns({"a": finished_run}, PROMPTS, rewards, output=tmp_path, **QUIET, **changed)
    for columns, prompts, judges, what in (
        ({"a": finished_run}, PROMPTS[1:], rewards, "prompts"),
        ({"a": finished_run}, PROMPTS, [JPEGCompressibility(90)], "rewards"),
        ({"a": "base", "b": finished_run}, PROMPTS, rewards, "weights"),
    ):
        with pytest.raises(ConfigError, match=f"got another {what} for the column a"):
            fa.evaluate_columns(columns, prompts, judges, output=tmp_path, **QUIET)
    assert not made
    weights = finished_run / "checkpoints" / "step-1" / "manifest.json"
    weights.write_text(re.sub(r'(role_policy.*?"sha256": ").', r"\1x", weights.read_text(), flags=re.S))
    with pytest.raises(ConfigError, match="got another weights for the column a"):
        fa.evaluate_columns({"a": finished_run}, PROMPTS, rewards, output=tmp_path, **QUIET)


def test_a_policy_in_memory_is_known_by_its_role_and_its_negative_prompt(tiny_pipeline: Path, tmp_path: Path) -> None:
    policy, rewards, settings = (
        fa.load_policy(str(tiny_pipeline)),
        [JPEGCompressibility()],
        {**QUIET, "guidance_scale": 3.0},
    )
    fa.evaluate_columns({"mine": policy}, PROMPTS[:2], rewards, output=tmp_path, **settings)
    with policy.role("reference"), pytest.raises(ConfigError, match="another weights"):
        fa.evaluate_columns({"mine": policy}, PROMPTS[:2], rewards, output=tmp_path, **settings)
    policy.negative_prompt = "blue"
    with pytest.raises(ConfigError, match="another weights"):
        fa.evaluate_columns({"mine": policy}, PROMPTS[:2], rewards, output=tmp_path, **settings)
    policy.negative_prompt = ""
    fa.evaluate_columns({"mine": policy}, PROMPTS[:2], rewards, output=tmp_path, **settings)


def test_a_policy_in_memory_is_known_by_its_weights(tiny_pipeline: Path, tmp_path: Path, made: list[int]) -> None:
    policy = fa.load_policy(str(tiny_pipeline))
    call: dict[str, Any] = {
        "output": tmp_path,
        "size": fa.Size(24, 48),
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    fa.evaluate_columns({"mine": policy}, PROMPTS[:1], [darkness], **call, **QUIET)
    fa.evaluate_columns({"mine": policy}, PROMPTS[:1], [darkness], **call, **QUIET)
    assert sum(made) == 1
    policy.trainable_parameters()[0][1].data += 1
    with pytest.raises(ConfigError, match="another weights"):
        fa.evaluate_columns({"mine": policy}, PROMPTS[:1], [darkness], **call, **QUIET)


def test_what_cannot_be_is_said_before_a_model_is_loaded(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(self: Place, *arguments: Any) -> Policy:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Place, "load", loaded)
    run, jpeg = str(finished_run), [JPEGCompressibility()]
    for columns, rewards, changes, message in (
        ({}, jpeg, {}, "no columns"),
        ({"a/b": run}, jpeg, {}, "names a folder"),
        ({"a": f"{run}@7"}, jpeg, {}, "got step 7"),
        ({"a": f"{run}:ema"}, jpeg, {}, "keeps no average"),
        ({"a": "base"}, jpeg, {}, "got base without a run"),
        ({"a": "glyphs@3"}, jpeg, {}, "a checkpoint of a pipeline"),
        ({"a": "runs/none"}, jpeg, {}, "no run folder"),
        ({"a": run}, [], {}, "0 rewards"),
        ({"a": run}, [GroupDiversity()], {}, "expected at least 2"),
        ({"a": run}, jpeg, {"size": fa.Size(25, 48)}, "got image size 25×48"),
        ({"a": run}, jpeg, {"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"a": run}, [broken], {}, "reward 'broken' failed on 3 samples"),
    ):
        with pytest.raises(ConfigError, match=message):
            fa.evaluate_columns(columns, PROMPTS, rewards, **QUIET, **changes)  # type: ignore[arg-type]


def broken(images: Tensor, prompts: list[str]) -> Tensor:
    raise KeyError("no weights")


def test_runs_of_two_sizes_need_one(finished_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = (finished_run / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("height: 24", "height: 48"))
    (other / "checkpoints").symlink_to(finished_run / "checkpoints")
    with pytest.raises(ConfigError, match=r"24×48×1 of .*48×48×1 of"):
        fa.evaluate_columns({"a": finished_run, "b": other}, PROMPTS, [JPEGCompressibility()], **QUIET)


def test_a_part_of_what_is_trained_on_is_not_held_out() -> None:
    jpeg, statistics = JPEGCompressibility(name="guard"), ImageStatistics(("contrast", "edges"))
    trained = module.trained_labels(
        [jpeg, statistics], [Mix([JPEGCompressibility(), JPEGIncompressibility()], [1.0, 1.0])]
    )
    assert trained == {"guard"}
    assert module.trained_labels([jpeg, statistics], [statistics]) == {"image/contrast", "image/edges"}
    assert not module.trained_labels([jpeg], [JPEGCompressibility(90)])


def test_places_in_words() -> None:
    assert [column_name(text) for text in ("runs/a", "runs/a/", "a@40:raw", "glyphs", "owner/model-1.5")] == [
        "a", "a", "a@40-raw", "glyphs", "model-1.5",
    ]  # fmt: skip


def test_a_reward_that_fails_later_is_an_error(finished_run: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(images))
        if len(calls) > 3:
            raise ValueError("gone")
        return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match="gone"):
        fa.evaluate_columns({"a": finished_run}, PROMPTS, [failing], output=tmp_path / "out", **QUIET)


def test_a_video_is_written_frame_by_frame(tmp_path: Path) -> None:
    frames = torch.tensor([0, 80, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    write_image(tmp_path / "1-0.webp", frames, 8.0)
    with Image.open(tmp_path / "1-0.webp") as video:
        assert (video.n_frames, video.size) == (3, (16, 16))  # type: ignore[attr-defined]
        for number, level in enumerate((0, 80, 255)):
            video.seek(number)
            assert set(np.array(video.convert("RGB")).flatten().tolist()) == {level}
