"""Source images and clips from a call to what it leaves: on small real pipelines of an edit and of a video family."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import flowalign as fa
from flowalign import cli
from flowalign.evaluation.result_file import load_result, save_result
from flowalign.models import Policy
from flowalign.noise_optimization import BestOfN, optimize_noise
from flowalign.testing import tiny_pipeline
from rewards import ImageStatistics

SMALL = fa.Size(32, 64)
TWICE = ["make it blue", "make it red"]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("edits") / "kontext"
    tiny_pipeline("flux1_kontext").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clips") / "wan"
    tiny_pipeline("wan21").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def kontext(edits: str) -> Policy:
    return fa.load_policy(edits, trainable="none", sampling=fa.Sampling(2, 1.0, SMALL))


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "red.png", tmp_path / "blue.png"]
    for file, color in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (128, 32), color).save(file)
    return files


def contrast() -> ImageStatistics:
    return ImageStatistics(("contrast",), name="contrast")


def test_generate_edits_the_image_that_the_call_names(kontext: Policy, sources: list[Path]) -> None:
    one, other = (kontext.generate(TWICE[0], image=source).pixels for source in sources)
    assert one.shape == (1, 3, 32, 64) and not torch.equal(one, other)
    with Image.open(sources[0]) as picture:
        assert torch.equal(kontext.generate(TWICE[0], image=picture).pixels, one)
    both = kontext.generate([TWICE[0]] * 2, image=sources).pixels
    records = fa.as_records([TWICE[0]] * 2, sources)
    assert torch.equal(both, kontext.generate(records).pixels) and not torch.equal(both[0], both[1])


def test_noise_optimization_keeps_the_source_beside_its_images(
    kontext: Policy, sources: list[Path], tmp_path: Path
) -> None:
    found = optimize_noise(
        kontext, TWICE, contrast(), steps=2, method=BestOfN(), image=[str(each) for each in sources], progress=False
    )
    assert torch.equal(found.first_images.pixels, kontext.generate(TWICE, image=sources).pixels)
    folder = found.save(tmp_path / "out")
    for place, color in enumerate(((255, 0, 0), (0, 0, 255))):
        with Image.open(folder / f"source-{place}.png") as picture:
            assert picture.size == (128, 32) and picture.getpixel((5, 5)) == color
    titles = [axis.get_title() for axis in found.plot().axes]
    assert titles[titles.index("source") :][:2] == ["source", "start"]


def test_an_evaluation_shows_the_source_in_a_column_of_its_own(
    kontext: Policy, sources: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluation = fa.evaluate_columns(
        {"base": kontext}, TWICE, [contrast()], images=sources, output=out, samples_per_prompt=2, progress=False
    )
    result = evaluation.columns["base"]
    assert [result.sources[uid][:, 0, 0].tolist() for uid in (0, 1)] == [[255, 0, 0], [0, 0, 255]]
    data = (out / "report.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    assert list(json.loads(data)["sources"]) == ["0", "1"]
    with Image.open(out / "grid.png") as grid:
        colors = {color for _, color in grid.convert("RGB").getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
    alone = fa.evaluate(kontext, TWICE, [contrast()], images=sources, samples_per_prompt=2)
    assert alone.sources.keys() == result.sources.keys()
    assert int((alone.pixels.int() - result.pixels.int()).abs().max()) <= 1
    save_result(tmp_path / "base.safetensors", alone)
    back = load_result(tmp_path / "base.safetensors")
    assert torch.equal(back.sources[1], alone.sources[1]) and back.scores.keys() == alone.scores.keys()
    save_result(tmp_path / "base.safetensors", replace(alone, sources={}))
    assert load_result(tmp_path / "base.safetensors").sources == {}


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    with av.open(path) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], float(rate)


def test_noise_optimization_of_clips_leaves_clips_to_look_at(clips: str, tmp_path: Path) -> None:
    arguments = [
        clips,
        "a word",
        "--rewards",
        "rewards.VideoStatistics",
        "--method",
        "best-of-n",
        "--steps",
        "2",
        "--sampling-steps",
        "2",
    ]
    assert cli.optimize_noise([*arguments, "--size", "32x64x5", "--fps", "6", "--output", str(tmp_path / "out")]) == 0
    for name in ("first", "image"):
        frames, fps = frames_of(tmp_path / "out" / f"{name}.mp4")
        assert [frame.shape for frame in frames] == [(192, 384, 3)] * 5 and fps == 6
    with Image.open(tmp_path / "out" / "progress.png") as picture:
        assert picture.size[0] > 300
    assert not list((tmp_path / "out").glob("source*"))


def test_the_command_lines_take_source_images(edits: str, sources: list[Path], tmp_path: Path) -> None:
    rewards = ["--rewards", "rewards.JPEGCompressibility", "--image", str(sources[1])]
    noise = [edits, "make it blue", *rewards, "--method", "best-of-n", "--steps", "1", "--sampling-steps", "1"]
    assert cli.optimize_noise([*noise, "--size", "32x64", "--output", str(tmp_path / "noise")]) == 0
    with Image.open(tmp_path / "noise" / "source.png") as picture:
        assert picture.getpixel((5, 5)) == (0, 0, 255)
    (tmp_path / "prompts.txt").write_text("make it blue\nmake it red\n")
    measured = [edits, "--prompts", str(tmp_path / "prompts.txt"), *rewards, "--steps", "1", "--guidance", "1"]
    assert cli.evaluate([*measured, "--size", "32x64", "--output", str(tmp_path / "out")]) == 0
    assert '"sources":{"0":"data:image/png' in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        (
            "edits",
            [],
            "with 0 source images for a FluxKontextPipeline; expected 1: give them by image=… in the call, --image",
        ),
        ("edits", ["red", "blue"], "with 2 source images for a FluxKontextPipeline; expected 1: leave them out"),
        ("clips", ["red"], "with 1 source image for a WanPipeline; expected 0: leave them out"),
        ("edits", ["green"], "green.png does not exist"),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused_before_it_is_loaded(
    model: str, image: list[str], message: str, request: pytest.FixtureRequest, sources: list[Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, folder = request.getfixturevalue(model), sources[0].parent
    monkeypatch.setattr("flowalign.run.places.Place.load", None)
    monkeypatch.setattr("flowalign.noise_optimization.optimize.load_policy", None)
    images = ["--image", *(str(folder / f"{name}.png") for name in image)] if image else []
    (folder / "prompts.txt").write_text("make it blue\n")
    size = "32x64x5" if model == "clips" else "32x64"
    shared = [*images, "--rewards", "rewards.JPEGCompressibility", "--size", size, "--guidance", "1"]
    assert cli.optimize_noise([path, "make it blue", *shared, "--method", "best-of-n"]) == 2
    assert message in capsys.readouterr().err
    assert cli.evaluate([path, "--prompts", str(folder / "prompts.txt"), *shared, "--steps", "1"]) == 2
    assert message in capsys.readouterr().err
    if image != ["green"]:
        given = [folder / f"{name}.png" for name in image] or None
        with pytest.raises(ValueError, match=message[:40]):
            optimize_noise(path, "make it blue", contrast(), method=BestOfN(), image=given)
