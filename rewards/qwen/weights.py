"""Reads reward checkpoints on Qwen2-VL: names of older releases of transformers, PEFT's names, LoRA merged into the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from rewards.image.checkpoints import find_file, read_state

State = dict[str, Tensor]


def todays_names(state: Mapping[str, Tensor]) -> State:
    """The tensors by their names in transformers' Qwen2VLModel (`visual.*`, `language_model.*`); heads keep theirs.

    Before transformers 4.52 they were `visual.*` and `model.*`, then `model.visual.*` and `model.language_model.*`; PEFT puts
    `base_model.model.` before and the adapter's name (`default`) into them. `lm_head` is left out: a reward has no use for
    it. ValueError if two names become one."""
    renamed: State = {}
    for old, tensor in state.items():
        name = old.removeprefix("base_model.model.").replace(".default.", ".").removeprefix("model.")
        if name.startswith("lm_head."):
            continue
        if name.startswith(("embed_tokens.", "layers.", "norm.")):
            name = f"language_model.{name}"
        if name in renamed:
            raise ValueError(f"got {old!r} as a second tensor {name!r}; expected one layout of names in a checkpoint")
        renamed[name] = tensor
    return renamed


def merge_lora(state: Mapping[str, Tensor], alpha: float, rslora: bool = False) -> State:
    """W + (alpha / r) B A, in fp32, for each pair lora_A [r, in], lora_B [out, r]; alpha / sqrt(r) with rslora (2312.03732).

    The weight is `place.base_layer.weight` (a saved PEFT model) or `place.weight` (a base model beside an adapter).
    ValueError for half a pair, and for one whose weight is missing."""
    pairs = {name.partition(".lora_")[0] for name in state if ".lora_" in name}
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for place in pairs:
        down, up, weight = f"{place}.lora_A.weight", f"{place}.lora_B.weight", f"{place}.weight"
        if lacks := [name for name, there in ((down, state), (up, state), (weight, merged)) if name not in there]:
            raise ValueError(
                f"got a LoRA of {place!r} without {lacks}; expected both factors and the weight they change"
            )
        rank = len(state[down])
        change = state[up].float() @ state[down].float()
        merged[weight] = merged[weight].float() + alpha / (rank**0.5 if rslora else rank) * change
    return merged


def split_heads(state: Mapping[str, Tensor]) -> tuple[State, dict[str, State]]:
    """The body's tensors, and those of each head by its name: `rm_head.*` is "rm_head", `rm_heads.head_0.*` is "head_0"."""
    body: State = {}
    heads: dict[str, State] = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if first == "rm_heads":
            first, _, rest = rest.partition(".")
        elif first != "rm_head":
            body[name] = tensor
            continue
        heads.setdefault(first, {})[rest] = tensor
    return body, heads


def head_of(state: Mapping[str, Tensor], source: str) -> nn.Sequential:
    """[n, D] -> [n, O]: one linear layer without bias (`weight`), or linear layers with ReLU between them, in the order of
    their numbers (`0.weight`, `0.bias`, `3.weight`, …; the numbers between are ReLU and dropout, which is not kept).

    ValueError for other names, and for layers that do not fit one another."""
    if set(state) == {"weight"}:
        return nn.Sequential(_linear(state["weight"], None))
    found = {name.partition(".")[0] for name in state}
    numbers = sorted(int(number) for number in found if number.isdecimal())
    expected = {f"{number}.{part}" for number in numbers for part in ("weight", "bias")}
    layers: list[nn.Module] = []
    if set(state) == expected:
        for number in numbers:
            layer = _linear(state[f"{number}.weight"], state[f"{number}.bias"])
            layers += [nn.ReLU(), layer] if layers else [layer]
    widths = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    if not layers or any(one[1] != next_one[0] for one, next_one in itertools.pairwise(widths)):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"got a head of {source} with the tensors {shapes}; expected weight, or 0.weight, 0.bias, 3.weight, …"
        )
    return nn.Sequential(*layers)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def find_first(what: str, place: str, files: Iterable[str]) -> Path:
    """The first of the files that `place` (file, folder or hub id) has; the error of the last one if it has none."""
    *others, last = files
    for file in others:
        try:
            return find_file(what, place, file)
        except FileNotFoundError:
            continue
    return find_file(what, place, last)


def find_folder(what: str, place: str) -> Path:
    """`place` itself if it is a folder, else all of the hub repository `place`."""
    local = Path(place).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"got {what}={place!r}, neither a folder nor in the cache of the hub ({str(error).splitlines()[0]}); expected one of "
            f"them: `hf download {place}`, or set {what} to a folder"
        ) from error


def read_shards(folder: Path) -> State:
    """The tensors of all model*.safetensors of a folder of transformers."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"got {folder} without model*.safetensors; expected the weights of the base model there"
        )
    return {name: tensor for file in files for name, tensor in read_state(file).items()}


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """The state dict itself, or the one under its key `model`."""
    inner = state.get("model", state)
    return dict(inner) if isinstance(inner, Mapping) else dict(state)
