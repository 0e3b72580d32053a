"""Policy folders with something missing, damaged, swapped or not finite."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.campaign.case import Case

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
CONFIGS = {
    "transformer": "config.json", "vae": "config.json", "text_encoder": "config.json",
    "scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json",
}  # fmt: skip


def removed(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "pipeline" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "pipeline" / name).write_bytes(content)

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "pipeline" / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def tensors(name: str, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    """Changes a weight of the file: `change(weights, name of the largest one)`."""

    def damage(folder: Path) -> None:
        path = folder / "pipeline" / name
        weights = {key: value.clone() for key, value in load_file(path).items()}
        change(weights, max(weights, key=lambda key: weights[key].numel()))
        save_file(weights, path, metadata={"format": "pt"})

    return damage


def edited(name: str, **entries: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "pipeline" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return damage


def moved(source: str, target: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        removed(target)(folder)
        (shutil.copytree if (folder / "pipeline" / source).is_dir() else shutil.copy)(
            folder / "pipeline" / source, folder / "pipeline" / target
        )

    return damage


def case(name: str, damage: Callable[[Path], None] | None, says: str, *overrides: str) -> Case:
    return Case(name, overrides, damage=damage, says=says, seconds=40)


CASES = [
    *(case(f"{part}: missing", removed(part), part) for part in
      ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")),
    *(case(f"{part}: no weights", removed(f"{part}/{file}"), part) for part, file in WEIGHTS.items()),
    *(case(f"{part}: empty weights", written(f"{part}/{file}", b""), part) for part, file in WEIGHTS.items()),
    *(case(f"{part}: cut weights", cut(f"{part}/{file}", 0.6), part) for part, file in WEIGHTS.items()),
    *(case(f"{part}: garbage", written(f"{part}/{file}", b"\xff" * 4096), part) for part, file in WEIGHTS.items()),
    *(case(f"{part}: NaN", tensors(f"{part}/{file}", lambda w, k: w[k].view(-1).__setitem__(0, torch.nan)), part)
      for part, file in WEIGHTS.items()),
    *(case(f"{part}: infinite", tensors(f"{part}/{file}", lambda w, k: w[k].fill_(torch.inf)), part)
      for part, file in WEIGHTS.items()),
    *(case(f"{part}: a tensor is missing", tensors(f"{part}/{file}", lambda w, k: w.pop(k)), part)
      for part, file in WEIGHTS.items()),
    *(case(f"{part}: another shape", tensors(f"{part}/{file}", lambda w, k: w.update({k: w[k][:1].contiguous()})), part)
      for part, file in WEIGHTS.items()),
    *(case(f"{part}: no {file}", removed(f"{part}/{file}"), part) for part, file in CONFIGS.items() if part != "tokenizer"),
    *(case(f"{part}: damaged {file}", written(f"{part}/{file}", b'{"a": '), part) for part, file in CONFIGS.items()),
    *(case(f"{part}: {file} is a list", written(f"{part}/{file}", b"[]"), part) for part, file in CONFIGS.items()),
    case("tokenizer: no files", lambda folder: [p.unlink() for p in (folder / "pipeline/tokenizer").iterdir()] and None, "tokenizer"),  # type: ignore[func-returns-value]
    case("no index", removed("model_index.json"), "model_index.json"),
    case("damaged index", written("model_index.json", b"{"), "model_index.json"),
    case("index is a list", written("model_index.json", b"[1]"), "model_index.json"),
    case("empty index", written("model_index.json", b"{}"), "model_index.json|pipeline"),
    case("an unknown pipeline", edited("model_index.json", _class_name="MyPipeline"), "MyPipeline"),
    case("an unsupported pipeline", edited("model_index.json", _class_name="PixArtAlphaPipeline"), "PixArtAlphaPipeline"),
    case("another scheduler", edited("model_index.json", scheduler=["diffusers", "DDPMScheduler"]), "DDPMScheduler|scheduler"),
    case("no scheduler in the index", edited("model_index.json", scheduler=None), "scheduler"),
    case("another transformer", edited("model_index.json", transformer=["diffusers", "FluxTransformer2DModel"]), "transformer"),
    case("an unknown transformer", edited("model_index.json", transformer=["diffusers", "NoSuchModel"]), "transformer|NoSuchModel"),
    case("the vae is the transformer", moved("transformer", "vae"), "vae"),
    case("the transformer is the vae", moved("vae", "transformer"), "transformer"),
    case("encoder weights of the transformer", moved("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"), "text_encoder"),
    case("a width that does not fit", edited("transformer/config.json", num_layers=3), "transformer"),
    case("a negative width", edited("transformer/config.json", num_attention_heads=-2), "transformer"),
    case("a text as width", edited("transformer/config.json", num_attention_heads="two"), "transformer"),
    case("channels that differ", edited("vae/config.json", latent_channels=7), "vae|channels"),
    case("a file", None, "tiny.yaml", "policy.path=tiny.yaml"),
    case("a folder without anything", lambda folder: (folder / "nothing").mkdir(), "nothing", "policy.path=nothing"),
    case("not there", None, "nowhere", "policy.path=./nowhere"),
    case("a hub id that cannot be reached", None, "nobody/nothing", "policy.path=nobody/nothing"),
    case("an empty path", None, "policy.path", "policy.path="),
    case("a single file", None, "weights.safetensors", "policy.path=pipeline/transformer/weights.safetensors"),
    case("an url", None, "https", "policy.path=https://example.com/model"),
    case("targets that match nothing", None, "targets", "policy.lora.targets=[attn.to_z]"),
    case("no targets", None, "targets", "policy.lora.targets=[]"),
    case("a LoRA that is not there", None, "nowhere", "policy.lora.init=nowhere"),
    case("another family", None, "family|StableDiffusion", "policy.family=flowalign.models.families.sd15.FAMILY"),
    case("a family that is not there", None, "family", "policy.family=flowalign.models.families.sd99.FAMILY"),
    Case("one that works", fine=True),
]  # fmt: skip
