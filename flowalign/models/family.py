"""What must be known of a model family before its weights are read, and the checks that families share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

import samplers
from flowalign.data import PromptRecord
from flowalign.models.base import Model, Size

# component of the pipeline -> its configuration: the trained networks and "vae"
Configs = Mapping[str, Mapping[str, Any]]


# what the guidance scale is: the weight of a second row, an input of the network, or nothing
Guidance = Literal["classifier_free", "embedded", "none"]


@dataclass(frozen=True)
class Distilled:
    """What a checkpoint's configuration says of its distillation. steps: the most that it was distilled for; None: it says nothing of
    few steps. ignores_guidance: whether it has no input for the guidance scale and no second row."""

    steps: int | None = None
    ignores_guidance: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """What must be known of a model family before its weights are read: a value of this is what a family's file ends with."""

    # the pipeline's class, named in model_index.json
    pipeline: Any
    # makes the Model: model(pipeline, **options), where the options are `policy.options` and, if given, `max_sequence_length`; it takes
    # those in its signature
    model: Callable[..., Model]
    # trained component -> its diffusers class; one that a checkpoint lacks (null in model_index.json) is left out
    networks: Mapping[str, Any]
    # LoRA targets by default
    targets: tuple[str, ...]
    # the noising law from the scheduler's configuration (with "_class_name"); ValueError for steps that the rollout cannot repeat
    path: Callable[[dict[str, Any]], samplers.Path]
    # of one latent, from the components' configurations; ValueError for a size that the model cannot make
    latent_shape: Callable[[Size, Configs], tuple[int, ...]]
    # see Policy
    rows_per_state: Callable[[float], int]
    # the least and the most source images of a record
    source_images: tuple[int, int] = (0, 0)
    # whether the pipeline fits source images itself, each in its own aspect ratio; if not, they are fitted to what is generated
    own_fit: bool = False
    # whether the pipeline's call takes a negative prompt; if not, guidance starts from ""
    negative_prompts: bool = True
    # whether the pipeline's call can step over levels that are not its scheduler's own, see `Model.pipeline_sigmas`
    takes_levels: bool = True
    # from the components' configurations, the scheduler's too (with "_class_name")
    distilled: Callable[[Configs], Distilled] = lambda configs: Distilled()
    # fields of this that a checkpoint's model_index.json changes, such as the rows of a distilled one
    variant: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda index: {}
    # extra arguments of `from_pretrained`, from model_index.json
    load_arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda index: {}
    # lines of Python that load into `pipe` what `Policy.save_lora` wrote into a folder, given as Python
    load_lora: Callable[[str], list[str]] = lambda folder: [f"pipe.load_lora_weights({folder})"]
    # very small pipelines for tests (`flowalign.testing.tiny_pipeline`): name -> component -> (class, configuration), or another argument
    # of the pipeline; the scheduler is the released one
    tiny: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, index: Mapping[str, Any]) -> Family:
        """As it is for a checkpoint with this model_index.json, or a live pipeline with this configuration."""
        there = {name for name in self.networks if name not in index or index[name][0] is not None}
        networks = {name: kind for name, kind in self.networks.items() if name in there}
        return replace(self, **{"networks": networks, **self.variant(index)})


def check_source_images(records: Sequence[PromptRecord], family: Family) -> None:
    """ValueError for a prompt with fewer or more source images than the model reads; those of a model of text alone would not
    be seen."""
    least, most = family.source_images
    for record in records:
        if not least <= len(record.images) <= most:
            wanted, count = f"{least}" if least == most else f"{least} to {most}", len(record.images)
            way = "image=… in the call, --image on the command line, or 'image' or 'images' in the prompt file"
            raise ValueError(
                f"got the prompt {record.prompt!r} with {count} source image{'s' * (count != 1)} for a {family.pipeline.__name__}; expected "
                f"{wanted}: "
                + (f"give them by {way}" if count < least else "leave them out, or take a model that reads as many")
            )


def check_negative_prompts(prompts: Iterable[str | None], family: Family) -> None:
    """ValueError for a negative prompt with a text where the pipeline takes none; None and "" say nothing."""
    given = [prompt for prompt in prompts if prompt]
    if given and not family.negative_prompts:
        raise ValueError(
            f"got the negative prompt {given[0]!r} for a {family.pipeline.__name__}, whose call takes none; expected none: leave "
            "policy.negative_prompt and those of the prompt files out"
        )


def check_image(size: Size, unit: int) -> None:
    """ValueError unless `size` is one image whose height and width are positive multiples of `unit`."""
    if min(size.height, size.width) < unit or size.height % unit or size.width % unit:
        raise ValueError(
            f"got image size {size.height}×{size.width}; expected positive multiples of {unit} for this model: change "
            "policy.height and policy.width"
        )
    if size.frames != 1:
        raise ValueError(f"got {size.frames} frames for a model of images; expected 1: leave policy.frames out")


def vae_reduction(config: Mapping[str, Any]) -> int:
    """Pixels per latent in each direction, of an AutoencoderKL's configuration."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def check_video(size: Size, unit: int, frame_unit: int) -> None:
    """ValueError unless height and width are positive multiples of `unit`, and the frames 1 or 1 more than a multiple of
    `frame_unit`."""
    check_image(Size(size.height, size.width), unit)
    if size.frames < 1 or (size.frames - 1) % frame_unit:
        raise ValueError(
            f"got {size.frames} frames; expected 1 more than a multiple of {frame_unit} for this model, such as {4 * frame_unit + 1}: change "
            "policy.frames"
        )


def prompts_and_negatives(records: Sequence[PromptRecord], negatives: Sequence[PromptRecord] | None) -> dict[str, Any]:
    """`Model.pipeline_inputs` of a pipeline that takes `prompt` and `negative_prompt` and no images."""
    own = {"prompt": [record.prompt for record in records]}
    return own if negatives is None else own | {"negative_prompt": [record.prompt for record in negatives]}


def no_levels(sigmas: Tensor) -> tuple[list[str], dict[str, Any]]:
    """`Model.pipeline_sigmas` of a pipeline whose call takes no levels: ValueError."""
    raise ValueError(
        "got levels for a pipeline whose call takes none, since its scheduler makes its own; expected none: set schedule=null in rollout and "
        "evaluation"
    )
