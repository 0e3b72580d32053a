"""Checks of a checkpoint and of what is to be done with it, from its configurations and headers, before weights are read."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from flowalign.data import PromptRecord
from flowalign.models.base import Size
from flowalign.models.checkpoint_files import check_files
from flowalign.models.checkpoints import empty_networks, inspect_checkpoint
from flowalign.models.family import Distilled, Family, Guidance, check_source_images
from flowalign.models.lora import LoRA, linear_modules, matched_modules
from flowalign.models.lora_file import read_lora
from flowalign.models.lora_start import lora_files
from flowalign.models.roles import Role
from flowalign.models.shipped import resolve
from flowalign.models.switches import Switches
from flowalign.models.vae_tiles import check_tiling
from samplers import Path as NoisingPath


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


def path_of(path: str, family: str | None = None) -> NoisingPath:
    """The noising law of a checkpoint, from its scheduler's config alone; ValueError for a scheduler we cannot follow."""
    index, known = inspect_checkpoint(path, family)
    settings = dict(DDIMScheduler.load_config(resolve(path), subfolder="scheduler"))  # reads the file of any class
    known.path(settings)
    # diffusers loads the class that model_index.json names, whatever the scheduler's own file says
    return known.path({**settings, "_class_name": index["scheduler"][1]})


def check_image_size(path: str, size: Size, family: str | None = None) -> tuple[int, ...]:
    """The shape of one latent; ValueError unless the model can make images of this size. From configurations alone."""
    index, known = inspect_checkpoint(path, family)
    kinds = {**known.networks, "vae": _class_of(index["vae"])}
    return known.latent_shape(size, {name: _settings(path, name, kind) for name, kind in kinds.items()})


def _class_of(entry: Sequence[str]) -> Any:
    library, kind = entry
    return getattr(importlib.import_module(library), kind)


def _settings(path: str, name: str, kind: Any) -> dict[str, Any]:
    """The configuration of a component as a loaded one has it: what its file does not say, since it is older than the option say, is
    the default of its class."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**defaults, **kind.load_config(resolve(path), subfolder=name)}


def check_sources(path: str, records: Sequence[PromptRecord], family: str | None = None) -> None:
    """ValueError for a prompt with fewer or more source images than the model reads; before a model is loaded."""
    check_source_images(records, inspect_checkpoint(path, family)[1])


def rows_per_state(path: str, guidance_scale: float, family: str | None = None) -> int:
    """See Policy.rows_per_state; before a model is loaded."""
    return inspect_checkpoint(path, family)[1].rows_per_state(guidance_scale)


def distilled_of(path: str, family: str | None = None) -> Distilled:
    """What the checkpoint's configurations say of its distillation."""
    index, known = inspect_checkpoint(path, family)
    read = next(iter(known.networks.values())).load_config  # reads the file of any model
    scheduler = dict(DDIMScheduler.load_config(resolve(path), subfolder="scheduler"))
    configs = {name: dict(read(resolve(path), subfolder=name)) for name in (*known.networks, "vae")}
    return known.distilled({**configs, "scheduler": {**scheduler, "_class_name": index["scheduler"][1]}})


def guidance_of(path: str, family: str | None = None) -> Guidance:
    """What the guidance scale is to this checkpoint."""
    if rows_per_state(path, 2.0, family) > 1:
        return "classifier_free"
    return "none" if distilled_of(path, family).ignores_guidance else "embedded"


def check_one_row(guidance: Guidance, negative_prompt: str, prompts: Iterable[PromptRecord]) -> None:
    """ValueError for a negative prompt, of the policy or of one of `prompts`, where guidance has no unconditional half."""
    given = [f"policy.negative_prompt={negative_prompt!r}"] if negative_prompt else []
    given += [
        f"the negative prompt {each.negative_prompt!r} of {each.prompt!r}" for each in prompts if each.negative_prompt
    ]
    if guidance != "classifier_free" and given:
        what = "is an input of its network" if guidance == "embedded" else "is ignored"
        raise ValueError(
            f"got {given[0]} for a model whose guidance scale {what}: it has no unconditional half, so that this would silently do "
            "nothing; expected none: leave it out"
        )


def check_lora_targets(path: str, targets: Sequence[str] | None, family: str | None = None) -> list[str]:
    """The modules that `targets` (None: the family's) match, from the networks' configs alone; ValueError if one matches
    nothing. With several networks each must match all, and a name begins with the network's."""
    _, known = inspect_checkpoint(path, family)
    empty, wanted = empty_networks(path, known), known.targets if targets is None else targets
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
        for network in empty_networks(path, known).values()
        for module in matched_modules(network, known.targets if lora.targets is None else lora.targets)
    ]
    return sum(lora.rank * sum(weight.shape) for layer in layers for weight in layer.parameters() if weight.ndim == 2)


def check_lora_folders(path: str, lora: LoRA, roles: Mapping[str, Role], family: str | None = None) -> None:
    """FileNotFoundError or ValueError for a LoRA, of the policy or of a role, that cannot be loaded; from the configs and
    the LoRA files' headers alone."""
    if lora.init is None and all(role.folder is None for role in roles.values()):
        return
    _, known = inspect_checkpoint(path, family)
    for name, network in empty_networks(path, known).items():
        targets = known.targets if lora.targets is None else lora.targets
        lora_files(lora, name, targets, network)
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
        for name, network in empty_networks(path, known).items():
            wanted = {key: value.shape for key, value in network.state_dict().items()}
            found = {key: value.shape for key, value in empty_networks(role.folder, known)[name].state_dict().items()}
            if differ := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
                raise ValueError(
                    f"got the role {label} with init={role.folder!r}, whose {name} differs from the policy's in {differ[0]} "
                    f"({len(differ)} tensors in all); expected a pipeline of the same network: take another one"
                )


def check_switches(path: str, switches: Switches, family: str | None = None) -> None:
    """ValueError for switches that a network or this machine cannot do; from the configurations alone."""
    if switches != Switches():
        switches.check(empty_networks(path, inspect_checkpoint(path, family)[1]))


def check_vae_tiling(path: str, tiling: bool, family: str | None = None) -> None:
    """ValueError for tiles of a VAE that has none; by its class in model_index.json alone."""
    if tiling:
        check_tiling(_class_of(inspect_checkpoint(path, family)[0]["vae"]))


def check_options(family: Family, max_sequence_length: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the family's model beside the pipeline; ValueError for options that it does not have."""
    known = list(inspect.signature(family.model).parameters)[1:]
    own = [name for name in known if name != "max_sequence_length"]
    if unknown := [name for name in options if name not in own]:
        raise ValueError(
            f"got policy.options with {', '.join(unknown)} for a {family.pipeline.__name__}; "
            + (
                f"expected some of: {', '.join(own)}"
                if own
                else "expected none, since its model has no options: leave policy.options out"
            )
        )
    length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    return {**options, **length}


def check_fixed_rows(path: str, rows: int | None, family: str | None = None) -> None:
    """ValueError for a number of rows that the calls of this model's networks cannot all have."""
    if rows is not None:
        check_rows_of(rows, inspect_checkpoint(path, family)[1])


def check_rows_of(rows: int, family: Family) -> None:
    if rows < 1:
        raise ValueError(f"got fixed_rows={rows}; expected at least 1, or None")
    if len(family.networks) > 1:
        raise ValueError(
            f"got rollout.fixed_rows=true for a {family.pipeline.__name__}, which deals the states of a call to {len(family.networks)} "
            "networks; expected a model of one network: set it to false"
        )
