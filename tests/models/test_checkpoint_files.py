"""What is wrong in a pipeline folder is named by its path before any weight is read; NaN before anything is trained."""

import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from flowalign import cli
from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.models import load_policy
from flowalign.models.checkpoint_files import check_files
from flowalign.models.checks import check_checkpoint, check_image_size
from tests.helpers.families import subject

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def edited(file: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A fault: the JSON file changed."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return plant


def saved(file: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A fault: the tensors of the file changed."""

    def plant(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return plant


def cut(file: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def replaced(name: str, by: Callable[[Path], object]) -> Callable[[Path], object]:
    """A fault: a file or folder removed, then something else in its place."""

    def plant(folder: Path) -> None:
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        by(place)

    return plant


def gone(name: str) -> Callable[[Path], object]:
    return replaced(name, lambda place: None)


def a_file(name: str) -> Callable[[Path], object]:
    return replaced(name, lambda place: place.write_text("{}"))


def a_folder(name: str) -> Callable[[Path], object]:
    return replaced(name, lambda place: place.mkdir())


def shards(missing: bool) -> Callable[[Path], object]:
    """A fault: the weights in two shards, of which one is missing or the list is empty."""

    def plant(folder: Path) -> None:
        place = folder / "transformer"
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        parts = {"a-00001-of-00002.safetensors": names[:9], "a-00002-of-00002.safetensors": names[9:]}
        for file, keys in parts.items():
            save_file({key: tensors[key] for key in keys}, place / file)
        (folder / WEIGHTS).unlink()
        index = {"weight_map": {key: file for file, keys in parts.items() for key in keys} if missing else {}}
        (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        (place / "a-00002-of-00002.safetensors").unlink()

    return plant


FIRST = "transformer_blocks.0.attn.to_q.weight"
# fault: (how it is planted, what the message has to say: a path and a reason)
FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no index": (gone("model_index.json"), ("without a model_index.json",)),
    "index cut": (cut("model_index.json", 90), ("model_index.json", "no JSON")),
    "index empty": (cut("model_index.json", 0), ("model_index.json", "no JSON")),
    "index binary": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), ("model_index.json", "no JSON")),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), ("model_index.json", "a list")),
    "index a folder": (a_folder("model_index.json"), ("model_index.json", "a folder")),
    "index without a class": (edited("model_index.json", lambda c: c.pop("_class_name")), ("a None", "StableDiffusion3")),
    "index without a VAE": (edited("model_index.json", lambda c: c.pop("vae")), ("model_index.json", "vae=None")),
    "index with a null encoder": (
        edited("model_index.json", lambda c: c.update(text_encoder=[None, None])),
        ("model_index.json", "text_encoder=[None, None]"),
    ),
    "index of another transformer": (
        edited("model_index.json", lambda c: c.update(transformer=["diffusers", "FluxTransformer2DModel"])),
        ("model_index.json", "SD3Transformer2DModel"),
    ),
    **{f"no {name}": (gone(name), (f"nothing at FOLDER/{name}",)) for name in
       ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")},
    **{f"{name} a file": (a_file(name), (f"a file at FOLDER/{name}",)) for name in ("transformer", "tokenizer", "scheduler")},
    **{f"no {file}": (gone(file), (f"FOLDER/{file}", "no such file")) for file in
       ("transformer/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")},
    **{f"{file} cut": (cut(file, 30), (f"FOLDER/{file}", "no JSON")) for file in
       ("transformer/config.json", "vae/config.json", "text_encoder_2/config.json", "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")},
    "no tokenizer.json": (gone("tokenizer/tokenizer.json"), ("FOLDER/tokenizer with", "tokenizer.json")),
    "tokenizer empty": (a_folder("tokenizer"), ("FOLDER/tokenizer with no file",)),
    **{f"{part} without weights": (gone(file), (f"FOLDER/{part} without weights",)) for part, file in
       (("transformer", WEIGHTS), ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"))},
    "weights cut": (cut(WEIGHTS, 40_000), (f"FOLDER/{WEIGHTS} of 40,000 bytes", "damaged")),
    "weights empty": (cut(WEIGHTS, 0), (f"FOLDER/{WEIGHTS} of 0 bytes", "damaged")),
    "encoder cut": (cut("text_encoder/model.safetensors", 9), ("text_encoder/model.safetensors of 9 bytes", "damaged")),
    "weights garbage": (lambda f: (f / WEIGHTS).write_bytes(b"<html>" * 99), (f"FOLDER/{WEIGHTS}", "damaged")),
    "weights a folder": (a_folder(WEIGHTS), (f"a folder at FOLDER/{WEIGHTS}",)),
    "LFS pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"), (WEIGHTS, "damaged")),
    "a shard missing": (shards(missing=True), ("no file at FOLDER/transformer/a-00002-of-00002.safetensors",)),
    "shards not listed": (shards(missing=False), ("index.json without a weight_map",)),
    "a tensor missing": (saved(WEIGHTS, lambda t: t.pop(FIRST)), (f"FOLDER/transformer without {FIRST}",)),
    "an encoder's tensor missing": (
        saved("text_encoder/model.safetensors", lambda t: t.pop(next(key for key in t if "token_embedding" in key))),
        ("FOLDER/text_encoder without", "token_embedding"),
    ),
    "a VAE's tensor missing": (
        saved("vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("decoder.conv_in.weight")),
        ("FOLDER/vae without decoder.conv_in.weight",),
    ),
    "a wrong shape": (saved(WEIGHTS, lambda t: t.update({FIRST: torch.zeros(3, 5)})), (f"{WEIGHTS} with {FIRST}", "[3, 5]")),
    "integers": (saved(WEIGHTS, lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), (f"{WEIGHTS} with {FIRST}", "I8")),
    "another configuration": (
        edited("transformer/config.json", lambda c: c.update(num_layers=3)), ("norm1_context", "FOLDER/transformer/config.json says")
    ),
    "no such configuration": (
        edited("transformer/config.json", lambda c: c.update(num_layers="two")), ("FOLDER/transformer/config.json", "can be made (TypeError")
    ),
    "a transformer of another class": (
        edited("transformer/config.json", lambda c: c.update(_class_name="FluxTransformer2DModel")),
        ("FOLDER/transformer/config.json of a FluxTransformer2DModel", "SD3Transformer2DModel"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_its_path_before_a_weight_is_read(name: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    plant, said = FAULTS[name]
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    plant(folder)
    with pytest.raises(ValueError, match="; expected") as caught:
        check_checkpoint(str(folder))
    text = str(caught.value).replace(str(folder), "FOLDER")
    assert [part for part in said if part not in text] == [] and "\n" not in text, text


@pytest.mark.parametrize("name", ["index cut", "no tokenizer_2", "weights cut", "a tensor missing"])
def test_configurations_and_python_are_told(name: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    FAULTS[name][0](folder)
    with pytest.raises(ConfigError, match="; expected"):
        load_config(CONFIG, [f"policy.path={folder}"])
    with pytest.raises(ValueError, match="; expected"):
        load_policy(str(folder))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("file", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_weight_that_is_no_number_is_named(file: str, value: float, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder, names = tmp_path / "pipeline", []
    shutil.copytree(tiny_pipeline, folder)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names.append(max(tensors, key=lambda key: tensors[key].numel()))
        tensors[names[0]].flatten()[3] = value

    saved(file, spoil)(folder)
    with pytest.raises(
        ValueError, match=rf"whose {Path(file).parent} has 1 of \d+ values of .* NaN or infinite; expected"
    ):
        load_policy(str(folder))


def test_a_run_says_so_in_a_sentence(tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    saved(WEIGHTS, lambda tensors: tensors[FIRST].fill_(torch.nan))(folder)
    assert cli.train([CONFIG, f"policy.path={folder}", f"run.output={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"whose transformer has 1024 of 1024 values of {FIRST} that are NaN" in said and "Traceback" not in said


def test_what_diffusers_alone_can_tell_is_a_sentence_too(tiny_pipeline: Path, tmp_path: Path) -> None:
    """JSON, but no tokenizer."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"which diffusers cannot load as a StableDiffusion3Pipeline .*; expected"):
        load_policy(str(folder))


def test_a_hub_id_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> dict:
        raise OSError(f"{name} does not appear to have a file named model_index.json.")

    monkeypatch.setattr(DiffusionPipeline, "load_config", absent)
    with pytest.raises(ConfigError, match=r"got policy\.path='some/model', .* not appear .* log in .* HF_HUB_OFFLINE"):
        load_config(CONFIG, ["policy.path=some/model"])


def test_whole_folders_pass(tiny_pipeline: Path, tiny_sd15_pipeline: Path) -> None:
    for path in (tiny_pipeline, tiny_sd15_pipeline, "glyphs"):
        check_checkpoint(str(path))


def test_tied_and_renamed_tensors_are_there(tmp_path: Path) -> None:
    """T5's embedding is saved once under another name; older libraries wrote a prefix."""
    config = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=9)
    T5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    index = {"encoder": ["transformers", "T5EncoderModel"]}
    check_files(tmp_path, index, {}, ["encoder"], [])
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = {f"old.{key}": value for key, value in load_file(file).items()}
    save_file(tensors, file)
    check_files(tmp_path, index, {}, ["encoder"], [])
    tensors.pop("old.shared.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"encoder without shared\.weight \[9, 8\]"):
        check_files(tmp_path, index, {}, ["encoder"], [])


def test_shards_are_read_together(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    tensors = load_file(folder / WEIGHTS)
    shards(missing=True)(folder)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    second = [key for key, file in index.items() if "00002-of" in file]
    save_file({key: tensors[key] for key in second}, folder / "transformer" / "a-00002-of-00002.safetensors")
    check_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "sana", "sd3"])
def test_the_size_of_a_configuration_that_leaves_defaults_out(name: str, tmp_path: Path) -> None:
    """As of a checkpoint that is older than an option: the VAE of Wan 2.1 says no scale_factor_spatial."""
    family = subject(name)
    expected = check_image_size(family.folder, family.size)
    shutil.copytree(family.folder, tmp_path, dirs_exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(family.folder)
    for part, kind in {"transformer": type(pipe.transformer), "vae": type(pipe.vae)}.items():
        file = tmp_path / part / "config.json"
        defaults = {key: each.default for key, each in signature(kind.__init__).parameters.items()}
        said = json.loads(file.read_text())
        file.write_text(
            json.dumps(
                {
                    key: value
                    for key, value in said.items()
                    if json.dumps(value) != json.dumps(defaults.get(key), default=str)
                }
            )
        )
        assert len(json.loads(file.read_text())) < len(said)
    assert check_image_size(str(tmp_path), family.size) == expected
