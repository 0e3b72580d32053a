"""Loads a policy from a name, a folder, a hub id or a live pipeline, and checks a checkpoint's configurations before its
weights are read."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from torch import nn

from flowalign.models.base import Family, Policy, Sampling, Size
from flowalign.models.checkpoint_files import check_files, check_finite, read_index
from flowalign.models.lora import (
    ADAPTER,
    LoRA,
    activate,
    add_lora,
    base_adapters,
    linear_modules,
    lora_layers,
    matched_modules,
    set_adapter_weights,
    set_merged_weights,
)  # fmt: skip
from flowalign.models.lora_file import LoRAFile, read_lora
from flowalign.models.lora_merge import merge_loras
from flowalign.models.pipeline_policy import PROMPT_STORE_BYTES, Offloadable, PipelinePolicy
from flowalign.models.quantization import Quantization, check_quantization, quantization_config
from flowalign.models.roles import Role
from flowalign.models.sampling import defaults_of
from flowalign.models.shipped import SHIPPED, resolve
from flowalign.models.switches import Switches
from flowalign.models.trained_networks import TrainedNetworks
from samplers import Path as NoisingPath

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# pipeline class named in model_index.json -> its family, imported when it is used
FAMILIES = {
    "StableDiffusion3Pipeline": "flowalign.models.families.sd3.FAMILY",
    "StableDiffusionPipeline": "flowalign.models.families.sd15.FAMILY",
}


def inspect_checkpoint(path: str, family: str | None = None) -> tuple[dict[str, Any], Family]:
    """The pipeline's model_index.json, and its family: the one found by the pipeline's class, or `family`, the import path of
    another. Raises FileNotFoundError or ValueError before any weight is read."""
    name = resolve(path)
    local = Path(name)
    if not local.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise FileNotFoundError(
            f"got policy.path={path!r}, which does not exist (working directory: {Path.cwd()}); expected one of {', '.join(SHIPPED)}, a "
            "diffusers pipeline folder, or a hub id such as 'stabilityai/stable-diffusion-3.5-medium'"
        )
    index = read_index(local) if local.exists() else _hub_index(name)
    return index, family_of(f"policy.path={path!r}", str(index.get("_class_name")), family)


def _hub_index(name: str) -> dict[str, Any]:
    """model_index.json of a hub id; FileNotFoundError where it cannot be had."""
    try:
        return dict(DiffusionPipeline.load_config(name))
    except OSError as error:
        raise FileNotFoundError(
            f"got policy.path={name!r}, whose model_index.json cannot be had from the hub or its cache: {error} Expected a pipeline "
            "that this machine may read: accept its license on its page and log in (`hf auth login`), unset HF_HUB_OFFLINE, or "
            "name a folder that it was downloaded to"
        ) from error


def check_checkpoint(path: str, family: str | None = None) -> None:
    """FileNotFoundError or ValueError for a folder that holds no whole pipeline of its family, naming the file; from
    configurations and headers alone."""
    index, known = inspect_checkpoint(path, family)
    if not Path(resolve(path)).exists():
        return
    absent = {name for name, value in known.load_arguments(index).items() if value is None}
    parameters = inspect.signature(known.pipeline.__init__).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty and each.name not in {"self", *absent}]
    check_files(Path(resolve(path)), index, known.networks, needed, absent)


def family_of(what: str, pipeline: str, family: str | None = None) -> Family:
    """The family of the pipeline class `pipeline`, or the one that `family`, an import path such as my_module.FAMILY, names.
    what: where the class was found. ValueError for none, or for a family of another pipeline class."""
    if family is None and pipeline not in FAMILIES:
        raise ValueError(
            f"got {what}, a {pipeline}; expected one of {', '.join(FAMILIES)}, or policy.family, the import path of a Family "
            "of your own"
        )
    found = _import_family(FAMILIES[pipeline] if family is None else family)
    if found.pipeline.__name__ != pipeline:
        raise ValueError(
            f"got {what}, a {pipeline}, with policy.family={family}; expected a {found.pipeline.__name__}, which that family is "
            "of: change one of the two"
        )
    return found


def _import_family(name: str) -> Family:
    module, _, attribute = name.rpartition(".")
    try:
        found = vars(importlib.import_module(module))[attribute]
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(
            f"got policy.family={name!r}, which cannot be imported ({error!r}); expected module.NAME of a flowalign.models.Family"
        ) from error
    if type(found) is not Family:
        raise ValueError(f"got policy.family={name!r}, a {type(found).__name__}; expected a flowalign.models.Family")
    return found


def path_of(path: str, family: str | None = None) -> NoisingPath:
    """The noising law of a checkpoint, from its scheduler's config alone; ValueError for a scheduler we cannot follow."""
    index, known = inspect_checkpoint(path, family)
    settings = dict(DDIMScheduler.load_config(resolve(path), subfolder="scheduler"))  # reads the file of any class
    known.path(settings)
    # diffusers loads the class that model_index.json names, whatever the scheduler's own file says
    return known.path({**settings, "_class_name": index["scheduler"][1]})


def check_image_size(path: str, size: Size, family: str | None = None) -> tuple[int, ...]:
    """The shape of one latent; ValueError unless the model can make images of this size. From configurations alone."""
    _, known = inspect_checkpoint(path, family)
    read = next(iter(known.networks.values())).load_config  # reads the file of any model
    return known.latent_shape(
        size, {name: dict(read(resolve(path), subfolder=name)) for name in (*known.networks, "vae")}
    )


def rows_per_state(path: str, guidance_scale: float, family: str | None = None) -> int:
    """See Policy.rows_per_state; before a model is loaded."""
    return inspect_checkpoint(path, family)[1].rows_per_state(guidance_scale)


def check_lora_targets(path: str, targets: Sequence[str] | None, family: str | None = None) -> list[str]:
    """The modules that `targets` (None: the family's) match, from the networks' configs alone; ValueError if one matches
    nothing. With several networks each must match all, and a name begins with the network's."""
    _, known = inspect_checkpoint(path, family)
    empty, wanted = _empty_networks(path, known), known.targets if targets is None else targets
    several = len(empty) > 1
    return [
        f"{name}.{module}" if several else module
        for name, network in empty.items()
        for module in matched_modules(network, wanted)
    ]


def count_lora_numbers(path: str, lora: LoRA, family: str | None = None) -> int:
    """How many numbers the LoRA has, from the networks' configs alone: rank · (inputs + outputs) of each layer. ValueError if a
    target matches none."""
    _, known = inspect_checkpoint(path, family)
    layers = [
        network.get_submodule(module)
        for network in _empty_networks(path, known).values()
        for module in matched_modules(network, known.targets if lora.targets is None else lora.targets)
    ]
    return sum(lora.rank * sum(weight.shape) for layer in layers for weight in layer.parameters() if weight.ndim == 2)


def check_lora_folders(path: str, lora: LoRA, roles: Mapping[str, Role], family: str | None = None) -> None:
    """FileNotFoundError or ValueError for a LoRA, of the policy or of a role, that cannot be loaded; from the configs and
    the LoRA files' headers alone."""
    if lora.init is None and all(role.folder is None for role in roles.values()):
        return
    _, known = inspect_checkpoint(path, family)
    for name, network in _empty_networks(path, known).items():
        targets = known.targets if lora.targets is None else lora.targets
        _starts(lora, name, targets, network)
        modules = matched_modules(network, targets)
        for label, role in roles.items():
            if role.folder is None:
                continue
            file = read_lora(role.folder, name)
            file.check_modules(linear_modules(network))
            followers = [name for name, other in roles.items() if other.follows and other.of == label]
            if role.follows or followers:  # a follower has the shape of the policy
                what = f"which follows {role.of}" if role.follows else f"which {followers[0]} follows"
                file.check_equal(f"the role {label}, {what}", modules, lora.rank, lora.alpha)


def check_role_pipelines(path: str, roles: Mapping[str, Role], family: str | None = None) -> None:
    """FileNotFoundError or ValueError for a role of a policy with full weights whose pipeline is not whole, or has other
    networks than `path`; from the configurations and headers alone."""
    for label, role in roles.items():
        if role.folder is None:
            continue
        try:
            check_checkpoint(role.folder, family)
        except (ValueError, OSError) as error:
            raise type(error)(
                f"the role {label}, of a policy that trains full weights, starts from a pipeline (from a LoRA only with policy.trainable=lora): {error}"
            ) from error
        _, known = inspect_checkpoint(path, family)
        for name, network in _empty_networks(path, known).items():
            wanted = {key: value.shape for key, value in network.state_dict().items()}
            found = {key: value.shape for key, value in _empty_networks(role.folder, known)[name].state_dict().items()}
            if differ := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
                raise ValueError(
                    f"got the role {label} with init={role.folder!r}, whose {name} differs from the policy's in {differ[0]} "
                    f"({len(differ)} tensors in all); expected a pipeline of the same network: take another one"
                )


def check_switches(path: str, switches: Switches, family: str | None = None) -> None:
    """ValueError for switches that a network or this machine cannot do; from the configurations alone."""
    if switches != Switches():
        switches.check(_empty_networks(path, inspect_checkpoint(path, family)[1]))


def check_fixed_rows(path: str, rows: int | None, family: str | None = None) -> None:
    """ValueError for a number of rows that the calls of this model's networks cannot all have."""
    if rows is not None:
        _check_fixed_rows(rows, inspect_checkpoint(path, family)[1])


def _check_fixed_rows(rows: int, family: Family) -> None:
    if rows < 1:
        raise ValueError(f"got fixed_rows={rows}; expected at least 1, or None")
    if len(family.networks) > 1:
        raise ValueError(
            f"got rollout.fixed_rows=true for a {family.pipeline.__name__}, which deals the states of a call to {len(family.networks)} "
            "networks; expected a model of one network: set it to false"
        )


def _empty_networks(path: str, family: Family) -> dict[str, ModelMixin]:
    configs = {name: kind.load_config(resolve(path), subfolder=name) for name, kind in family.networks.items()}
    with init_empty_weights():
        return {name: kind.from_config(configs[name]) for name, kind in family.networks.items()}


def _shapes(path: str, family: Family, dtype: str, master_weights: bool) -> dict[str, ModelMixin]:
    """The networks without numbers, on the meta device; see `read_pipeline`."""
    networks = _empty_networks(path, family)
    for network in networks.values():
        network.to(DTYPES["fp32" if master_weights else dtype])
    return networks


def read_pipeline(
    path: str, family: str | None = None, *, dtype: str = "fp32", vae_dtype: str | None = None,
    master_weights: bool = False, quantization: Quantization | None = None, **parts: nn.Module,
) -> DiffusionPipeline:  # fmt: skip
    """The diffusers pipeline of a checkpoint. master_weights: the networks that are trained are fp32 whatever `dtype` is.
    quantization: of these networks, which are then on the current GPU. parts: components that are already there, by name; they
    are not read."""
    index, known = inspect_checkpoint(path, family)
    dtypes = {"default": DTYPES[dtype], "vae": DTYPES[vae_dtype or dtype]}
    if master_weights:
        dtypes |= dict.fromkeys(known.networks, torch.float32)
    arguments: dict[str, Any] = {**known.load_arguments(index), **parts}
    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, known.networks, DTYPES[dtype])
    try:
        pipeline = known.pipeline.from_pretrained(resolve(path), dtype=dtypes, **arguments)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise ValueError(
            f"got policy.path={path!r}, which diffusers cannot load as a {known.pipeline.__name__} ({type(error).__name__}: "
            f"{error}); expected a pipeline that {known.pipeline.__name__}.from_pretrained reads: save or download it anew"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_policy(
    path: str | DiffusionPipeline = "glyphs",
    *,
    lora: LoRA | str | None = None,
    trainable: Literal["lora", "full", "none"] = "lora",
    dtype: Literal["fp32", "bf16"] | None = None,
    vae_dtype: Literal["fp32", "bf16"] | None = None,
    family: str | None = None,
    max_sequence_length: int | None = None,
    negative_prompt: str = "",
    reference_copy: bool = False,
    device: str | torch.device | None = None,
    network_device: str | torch.device | None = None,
    offload: Sequence[Offloadable] = (),
    decode_batch: int | None = None,
    prompt_store: int = PROMPT_STORE_BYTES,
    sampling: Sampling | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    attention: str | None = None,
    fixed_rows: int | None = None,
    quantization: Quantization | None = None,
) -> Policy:
    """Loads a pipeline, or takes a live one, as a policy. One that is loaded onto a CUDA device lets the process's fp32 products
    there run in TF32.

    lora: its settings, or a LoRA to start from, with the settings of that: a run folder, its lora/, a folder of diffusers'
    save_lora_weights, or a .safetensors file. trainable: "lora" (the default LoRA if none is given), "full" weights, or "none".
    dtype: of networks and encoders, "fp32" by default. What is trained is fp32 in any case: with "bf16" adapters multiply in
    bf16, and full weights under torch's autocast, copies of them too. vae_dtype: of the VAE if it is another. family: the
    import path of a `Family` of your own. max_sequence_length: see the family's model. seed: of the adapters' initial weights.
    device: "cpu" by default. network_device: the trained networks' device if it is not `device` (see
    flowalign.distributed.fsdp2); on "meta" they are not read. reference_copy: keeps a frozen copy of the networks, the reference of a full fine-tuning with
    a KL. offload, decode_batch, prompt_store: see PipelinePolicy. sampling: how the policy generates where a call does not
    say; by default as the pipeline's own call.

    gradient_checkpointing: blocks of networks and VAE store no activations, their backward computes them again. compile: each
    repeated block of the networks is compiled, at its first call. attention: one of diffusers' back-ends, such as "flash".
    fixed_rows: states of every network call, see PipelinePolicy. quantization: of the networks' frozen linear layers, "8bit" or "4bit"
    (extra `quantization`), on a GPU, the current one.

    A live pipeline says dtype and device itself. Its networks are shared, not copied: they get the policy's adapters, are
    frozen otherwise and put into eval mode, so the pipeline samples with what is trained. Its scheduler and settings are
    copied. A LoRA that it has loaded stays active as part of the base, also of the reference, and is not saved with the
    policy's. Raises FileNotFoundError or ValueError, as far as possible before any weight is read."""
    switches = Switches(gradient_checkpointing, compile, attention)
    master_weights = trainable == "full" and dtype == "bf16"
    if isinstance(path, str):
        dtype, device = dtype or "fp32", device or "cpu"
        check_quantization(quantization, trainable, torch.device(device).type == "cuda")
        check_checkpoint(path, family)
        check_switches(path, switches, family)
        path_of(path, family)  # refuses a scheduler before the weights are read
        _, known = inspect_checkpoint(path, family)
        shapes = _shapes(path, known, dtype, master_weights) if network_device == "meta" else {}
        pipeline = read_pipeline(
            path, family, dtype=dtype, vae_dtype=vae_dtype, master_weights=master_weights, quantization=quantization, **shapes
        )  # fmt: skip
        check_finite(path, {name: part for name, part in pipeline.components.items() if name not in shapes})
        there = None if quantization else network_device or device  # quantized ones are on the GPU already
        _place(pipeline, device, dict.fromkeys(known.networks, there))
        _allow_tf32(device)
    else:
        _refuse_settings(
            dtype=dtype, vae_dtype=vae_dtype, device=device, network_device=network_device, quantization=quantization
        )
        known = family_of("a live pipeline", type(path).__name__, family)
        pipeline = copy.copy(path)
        pipeline.scheduler = copy.deepcopy(path.scheduler)
    model = known.model(pipeline, max_sequence_length)
    switches.check(model.networks)
    if fixed_rows is not None:
        _check_fixed_rows(fixed_rows, known)
    for name, network in model.networks.items():
        _check_full(trainable, name, network.dtype)
        network.eval().requires_grad_(trainable == "full")
        if trainable == "full" and lora_layers(network):
            raise ValueError(
                f"got trainable='full' for a {name} with adapters; expected none: unload or fuse them first"
            )
    for part in (model.vae, *model.encoders):
        part.requires_grad_(False)
    base: dict[str, tuple[str, ...]] = {}  # where nothing is added, all adapters stay as they are, fused ones too
    if trainable == "lora":
        base = {name: base_adapters(network) for name, network in model.networks.items()}
        for name, network in model.networks.items():
            _add_lora(network, name, lora or LoRA(), known, seed)
            activate(lora_layers(network), [*base[name], ADAPTER])
    copies = trainable == "full" and reference_copy
    frozen = (
        {name: copy.deepcopy(net).requires_grad_(False) for name, net in model.networks.items()} if copies else None
    )
    trained = TrainedNetworks(model.networks, has_lora=trainable == "lora", frozen=frozen, base=base)
    configs = {name: network.config for name, network in model.networks.items()}
    return PipelinePolicy(
        model, known, trained, sampling=sampling or defaults_of(pipeline, configs), negative_prompt=negative_prompt,
        device=device or model.vae.device, offload=offload, decode_batch=decode_batch, prompt_store=prompt_store,
        autocast=torch.bfloat16 if master_weights else None, switches=switches, fixed_rows=fixed_rows,
    )  # fmt: skip


def _refuse_settings(**given: object) -> None:
    """ValueError for what a live pipeline says itself."""
    if settings := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"got {', '.join(settings)} with a live pipeline; expected none: load it so, or use pipe.to(...) before"
        )


def _add_lora(network: nn.Module, name: str, lora: LoRA | str, family: Family, seed: int) -> None:
    if isinstance(lora, str):
        file = read_lora(lora, name)
        lora = LoRA(max(file.ranks.values()), max(file.alphas.values()), file.modules, init=lora)
    targets = family.targets if lora.targets is None else lora.targets
    files = _starts(lora, name, targets, network)
    add_lora(network, lora, targets, seed)
    if len(files) > 1:
        set_merged_weights(network, merge_loras(files, lora.rank, lora.alpha))
    elif files:
        set_adapter_weights(network, files[0])


def _starts(lora: LoRA, name: str, targets: Sequence[str], network: nn.Module) -> list[LoRAFile]:
    """The files that the policy's LoRA starts from, for one network. ValueError for one that does not fit: a single one has the
    policy's rank, alpha and layers, several have some of its layers."""
    folders = [lora.init] if isinstance(lora.init, str) else list(lora.init or ())
    files = [read_lora(folder, name) for folder in folders]
    for file in files:
        file.check_modules(linear_modules(network))
        modules = matched_modules(network, targets)
        if len(files) == 1:
            file.check_equal("policy.lora", modules, lora.rank, lora.alpha)
        elif beyond := sorted(set(file.modules) - set(modules)):
            raise ValueError(
                f"got {file.path} in policy.lora.init with adapters at {', '.join(beyond[:3])} ({len(beyond)} in all), which "
                "policy.lora.targets leaves out; expected all of them: add them to the targets"
            )
    return files


def _check_full(trainable: str, name: str, dtype: torch.dtype) -> None:
    if trainable == "full" and dtype != torch.float32:
        raise ValueError(
            f"got trainable='full' for a {name} in {str(dtype).removeprefix('torch.')}; expected fp32 weights for the optimizer: "
            f"load the pipeline with its {name} in torch.float32, or give its path with dtype='bf16', which multiplies in bf16"
        )


def _place(
    pipeline: DiffusionPipeline, device: str | torch.device, elsewhere: Mapping[str, str | torch.device | None]
) -> None:
    """Moves the parts to `device`, or to a place of their own; None: they stay where they are."""
    for name, part in pipeline.components.items():
        place = elsewhere.get(name, device)
        if isinstance(part, nn.Module) and place is not None:
            part.to(place)


def _allow_tf32(device: str | torch.device) -> None:
    """Products of fp32 tensors on a GPU keep 10 bits of each factor, and add in fp32; several times faster. On the CPU nothing is set:
    its fp32 is exact, and its own switch for this is another."""
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
