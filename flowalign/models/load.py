"""Loads a policy from a name, a folder, a hub id or a live pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from flowalign.models.base import Model, Policy, Sampling
from flowalign.models.checkpoint_files import check_finite
from flowalign.models.checkpoints import empty_networks, family_of, inspect_checkpoint
from flowalign.models.checks import (
    check_checkpoint,
    check_options,
    check_rows_of,
    check_switches,
    check_vae_tiling,
    path_of,
)
from flowalign.models.family import Family
from flowalign.models.lora import ADAPTER, LoRA, activate, base_adapters, lora_layers
from flowalign.models.lora_start import add_policy_lora
from flowalign.models.pipeline_policy import PROMPT_STORE_BYTES, Offloadable, PipelinePolicy
from flowalign.models.quantization import Quantization, check_quantization, quantization_config
from flowalign.models.sampling import defaults_of
from flowalign.models.shipped import resolve
from flowalign.models.switches import Switches
from flowalign.models.trained_networks import TrainedNetworks
from flowalign.models.vae_tiles import check_tiling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _shapes(path: str, family: Family, dtype: str, master_weights: bool) -> dict[str, ModelMixin]:
    """The networks without numbers, on the meta device; see `read_pipeline`."""
    networks = empty_networks(path, family)
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
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in parts:
            part.requires_grad_(
                False
            )  # torch's convolutions round otherwise where weights ask for a gradient, even without one
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
    options: Mapping[str, Any] | None = None,
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
    vae_tiling: bool = False,
) -> Policy:
    """Loads a pipeline, or takes a live one, as a policy. One that is loaded onto a CUDA device lets the process's fp32 products
    there run in TF32.

    lora: its settings, or a LoRA to start from, with the settings of that: a run folder, its lora/, a folder of diffusers'
    save_lora_weights, or a .safetensors file. trainable: "lora" (the default LoRA if none is given), "full" weights, or "none".
    dtype: of networks and encoders, "fp32" by default. What is trained is fp32 in any case: with "bf16" adapters multiply in
    bf16, and full weights under torch's autocast, copies of them too. vae_dtype: of the VAE if it is another. family: the
    import path of a `Family` of your own. max_sequence_length, options: see the family's model; the latter are its own, such as guidance_scale_2 of Wan 2.2. seed: of the adapters' initial weights.
    device: "cpu" by default. network_device: the trained networks' device if it is not `device` (see
    flowalign.distributed.fsdp2); on "meta" they are not read. reference_copy: keeps a frozen copy of the networks, the reference of a full fine-tuning with
    a KL. offload, decode_batch, vae_tiling, prompt_store: see PipelinePolicy. sampling: how the policy generates where a call does not
    say; by default as the pipeline's own call, a distilled model in the steps that it was distilled for, without guidance.

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
        check_vae_tiling(path, vae_tiling, family)
        path_of(path, family)  # refuses a scheduler before the weights are read
        pipeline, known = _read_onto(
            device, network_device or device, path, family, dtype, vae_dtype, master_weights, quantization
        )
    else:
        _refuse_settings(
            dtype=dtype, vae_dtype=vae_dtype, device=device, network_device=network_device, quantization=quantization
        )
        known = family_of("a live pipeline", type(path).__name__, family).of(path.config)
        pipeline = copy.copy(path)
        pipeline.scheduler = copy.deepcopy(path.scheduler)
    model = known.model(pipeline, **check_options(known, max_sequence_length, options or {}))
    switches.check(model.networks)
    if vae_tiling:
        check_tiling(type(model.vae))
    if fixed_rows is not None:
        check_rows_of(fixed_rows, known)
    for part in (model.vae, *model.encoders):
        part.requires_grad_(False)
    if trainable == "lora":
        trained = _with_lora(model.networks, lora or LoRA(), known, seed)
    else:
        trained = _without_lora(model.networks, trainable == "full", reference_copy)
    return PipelinePolicy(
        model, known, trained, sampling=sampling or _own_sampling(pipeline, model, known), negative_prompt=negative_prompt,
        device=device or model.vae.device, offload=offload, decode_batch=decode_batch, prompt_store=prompt_store,
        autocast=torch.bfloat16 if master_weights else None, switches=switches, fixed_rows=fixed_rows,
        vae_tiling=vae_tiling,
    )  # fmt: skip


def _read_onto(
    device: str | torch.device, network_device: str | torch.device, path: str, family: str | None, dtype: str,
    vae_dtype: str | None, master_weights: bool, quantization: Quantization | None,
) -> tuple[DiffusionPipeline, Family]:  # fmt: skip
    """A checkpoint with its family, its weights found finite, on its devices."""
    _, known = inspect_checkpoint(path, family)
    shapes = _shapes(path, known, dtype, master_weights) if network_device == "meta" else {}
    pipeline = read_pipeline(
        path, family, dtype=dtype, vae_dtype=vae_dtype, master_weights=master_weights, quantization=quantization, **shapes
    )  # fmt: skip
    check_finite(path, {name: part for name, part in pipeline.components.items() if name not in shapes})
    there = None if quantization else network_device  # quantized ones are on the GPU already
    _place(pipeline, device, dict.fromkeys(known.networks, there))
    _allow_tf32(device)
    return pipeline, known


def _with_lora(networks: Mapping[str, ModelMixin], lora: LoRA | str, family: Family, seed: int) -> TrainedNetworks:
    """The networks frozen, with the policy's adapters beside those that they have."""
    for network in networks.values():
        network.eval().requires_grad_(False)
    base = {name: base_adapters(network) for name, network in networks.items()}
    for name, network in networks.items():
        add_policy_lora(network, name, lora, family, seed)
        activate(lora_layers(network), [*base[name], ADAPTER])
    return TrainedNetworks(networks, has_lora=True, base=base)


def _without_lora(networks: Mapping[str, ModelMixin], full: bool, reference_copy: bool) -> TrainedNetworks:
    """The networks trained in full, or not at all; any adapters stay as they are, fused ones too."""
    for name, network in networks.items():
        if full:
            _check_full(name, network)
        network.eval().requires_grad_(full)
    copies = (
        {name: copy.deepcopy(net).requires_grad_(False) for name, net in networks.items()}
        if full and reference_copy
        else None
    )
    return TrainedNetworks(networks, has_lora=False, frozen=copies)


def _own_sampling(pipeline: DiffusionPipeline, model: Model, family: Family) -> Sampling | None:
    """As the pipeline's own call, of a distilled model as it was distilled; None where neither is known."""
    configs = {name: network.config for name, network in model.networks.items()}
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    distilled = family.distilled({**configs, "vae": model.vae.config, "scheduler": scheduler})
    return defaults_of(pipeline, configs, distilled)


def _refuse_settings(**given: object) -> None:
    """ValueError for what a live pipeline says itself."""
    if settings := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"got {', '.join(settings)} with a live pipeline; expected none: load it so, or use pipe.to(...) before"
        )


def _check_full(name: str, network: ModelMixin) -> None:
    """ValueError for a network that cannot be trained in full."""
    if network.dtype != torch.float32:
        raise ValueError(
            f"got trainable='full' for a {name} in {str(network.dtype).removeprefix('torch.')}; expected fp32 weights for the optimizer: "
            f"load the pipeline with its {name} in torch.float32, or give its path with dtype='bf16', which multiplies in bf16"
        )
    if lora_layers(network):
        raise ValueError(f"got trainable='full' for a {name} with adapters; expected none: unload or fuse them first")


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
