"""Every model family in flowalign/models/families keeps the contract of `Model`, shown by its tiny pipeline."""

import importlib
import json
import pkgutil
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowalign.data import as_records
from flowalign.models import Family, LoRA, Size, check_lora_targets, families, inspect_checkpoint, load_policy, path_of
from flowalign.models.checkpoints import FAMILIES
from flowalign.models.checks import check_image_size, rows_per_state
from flowalign.models.empty_pipeline import empty_pipeline
from flowalign.models.grid import pipeline_call
from flowalign.models.live_bytes import forward_bytes, update_bytes
from flowalign.models.load import read_pipeline
from flowalign.models.sampling import sample
from samplers import Listed, PlainShift, Schedule, check_schedule
from tests.helpers import tiny

PROMPTS = ['the word "KITE" in red on a yellow background', "a word", "the word"]
HEIGHT, WIDTH = 24, 48  # of the tiny pipelines
SIZE = Size(HEIGHT, WIDTH)
NAMES = sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family_of(name: str) -> Family:
    return importlib.import_module(f"flowalign.models.families.{name}").FAMILY


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(make(tmp_path_factory.mktemp(name) / "pipeline")) for name, make in tiny.PIPELINES.items()}


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param not in tiny.PIPELINES:
        pytest.fail(f"family {request.param} has no tiny pipeline: add one to PIPELINES in {tiny.__file__}")
    return request.param


def pipeline_of(folder: str, setup: list[str]) -> DiffusionPipeline:
    """Freshly read, then set up as the report tells the user."""
    pipeline = read_pipeline(folder)
    exec("\n".join(setup), {"pipe": pipeline})
    return pipeline


def test_every_family_is_known_by_its_pipeline(family: str, folders: dict[str, str]) -> None:
    index, found = inspect_checkpoint(folders[family])
    assert found is family_of(family) and found.pipeline.__name__ == index["_class_name"] in FAMILIES


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("guidance", "count"), [(1.0, 3), (3.0, 3)], ids=["plain", "guided"])
def test_the_deterministic_rollout_is_the_pipelines(
    family: str, folders: dict[str, str], guidance: float, count: int, steps: int
) -> None:
    policy = load_policy(folders[family], trainable="none", negative_prompt="a background")
    shape = policy.latent_shape(SIZE)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    arguments = policy.pipeline_arguments() | {"negative_prompt": ["a background"] * count}
    theirs: Tensor = pipeline_of(folders[family], policy.pipeline_setup())(
        prompt=PROMPTS[:count], latents=noise, num_inference_steps=steps, guidance_scale=guidance, height=HEIGHT,
        width=WIDTH, output_type="latent", **arguments,
    ).images  # fmt: skip
    conditions = policy.encode(as_records(PROMPTS[:count]), negative=guidance != 1, together=True)
    ours = sample(policy, conditions, noise, steps, guidance)
    assert policy.evaluations == count * steps * policy.rows_per_state(guidance)
    assert policy.rows_per_state(guidance) == rows_per_state(folders[family], guidance)
    assert float((theirs - noise).norm()) > 1e-3 * float(noise.norm())  # it did something
    if policy.path.rectified:
        assert torch.equal(ours, theirs)
    else:
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-6


@pytest.mark.parametrize("schedule", [PlainShift(3.0), PlainShift(1.7), Listed((1.0, 0.9, 0.31, 0.123))], ids=str)
def test_the_exported_call_steps_over_the_levels_of_a_schedule(
    family: str, folders: dict[str, str], schedule: Schedule
) -> None:
    """Difference 0 to our rollout: the pipeline's scheduler would shift the levels again. Or the schedule is refused, here
    and before loading."""
    policy = load_policy(folders[family], trainable="none", negative_prompt="a background")
    shape = policy.latent_shape(SIZE)
    if not policy.path.rectified:
        with pytest.raises(ValueError, match="schedule"):
            pipeline_call(policy, schedule, 4, shape)
        with pytest.raises(ValueError, match="schedule"):
            check_schedule(schedule, 4, path_of(folders[family]))
        return
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    setup, arguments = pipeline_call(policy, schedule, 4, shape)
    pipeline = pipeline_of(folders[family], setup)
    theirs: Tensor = pipeline(
        prompt=PROMPTS[:3], latents=noise, num_inference_steps=4, guidance_scale=1.0, height=HEIGHT, width=WIDTH,
        output_type="latent", **json.loads(json.dumps(arguments | {"negative_prompt": None})),
    ).images  # fmt: skip
    conditions = policy.encode(as_records(PROMPTS[:3]), together=True)
    ours = sample(policy, conditions, noise, 4, 1.0, schedule)
    assert torch.equal(ours, theirs) and not torch.equal(ours, sample(policy, conditions, noise, 4, 1.0))
    assert torch.equal(pipeline.scheduler.sigmas, schedule.sigmas(4, lambda steps: noise))
    assert pipeline_call(policy, None, 4, shape) == (policy.pipeline_setup(), policy.pipeline_arguments())


def test_sizes_are_accepted_before_and_after_loading_alike_and_decode_gives_them(
    family: str, folders: dict[str, str]
) -> None:
    policy, accepted = load_policy(folders[family], trainable="none"), 0
    for height, width in ((24, 48), (48, 24), (26, 48), (24, 44), (25, 25), (0, 48), (-24, 48)):
        try:
            shape = policy.latent_shape(Size(height, width))
        except ValueError as error:
            assert f"got image size {height}×{width}; expected" in str(error)
            with pytest.raises(ValueError, match=f"got image size {height}×{width}; expected"):
                check_image_size(folders[family], Size(height, width))
            continue
        check_image_size(folders[family], Size(height, width))
        images = policy.decode(torch.zeros(2, *shape))
        assert images.shape == (2, 3, height, width) and images.dtype == torch.float32
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        accepted += 1
    assert 2 <= accepted < 5


def test_encoded_images_are_the_vaes_own_and_decode_leads_back(family: str, folders: dict[str, str]) -> None:
    """Difference 0 to what the pipeline's VAE gives without noise, shifted and scaled as its image-to-image pipelines do; what
    decode makes of it is the VAE's own reconstruction."""
    policy: Any = load_policy(folders[family], trainable="none")
    vae = policy.model.pipeline.vae  # the same weights in memory: convolutions round by their alignment
    images = torch.rand(3, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mode()
        theirs = (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        rebuilt = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    latents = policy.encode_images(images)
    assert torch.equal(latents, theirs) and latents.dtype == torch.float32 and not latents.requires_grad
    assert latents.shape[1:] == policy.latent_shape(SIZE)
    torch.testing.assert_close(policy.decode(latents), rebuilt, rtol=0, atol=1e-5)  # x/s·s + c - c rounds
    for wrong, said in (
        (images[:, :1], r"shape \[3, 1, 24, 48\]; expected"), (images[0], "shape"), (images * 2, "pixels in"),
        (images - 0.5, "pixels in"), (images / 0, "pixels in"), (images[..., :-1, :], "size 23×48"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            policy.encode_images(wrong)


def test_encode_gives_one_row_per_prompt_in_their_order(family: str, folders: dict[str, str]) -> None:
    policy = load_policy(folders[family], trainable="none")
    conditions = policy.encode(as_records([*PROMPTS, PROMPTS[0]]))
    assert len(conditions) == 4
    for tensor in conditions.tensors.values():
        assert len(tensor) == 4 and torch.equal(tensor[0], tensor[3]) and not torch.equal(tensor[0], tensor[1])
    backwards = policy.encode(as_records(PROMPTS[::-1])).tensors
    assert all(torch.equal(backwards[name].flip(0), tensor[:3]) for name, tensor in conditions.tensors.items())


def test_the_default_lora_targets_match_and_all_of_it_is_trained(family: str, folders: dict[str, str]) -> None:
    targets = family_of(family).targets
    modules = check_lora_targets(folders[family], None)
    assert all(check_lora_targets(folders[family], [target]) for target in targets)
    names = [name for name, _ in load_policy(folders[family], lora=LoRA(rank=2, alpha=2)).trainable_parameters()]
    assert len(names) == 2 * len(modules) and all(any(f"{m}.lora_" in name for m in modules) for name in names)


def test_levels_and_path_are_known_from_the_configurations(family: str, folders: dict[str, str]) -> None:
    policy = load_policy(folders[family], trainable="none")
    assert type(path_of(folders[family])) is type(policy.path)
    shape = policy.latent_shape(SIZE)
    sigmas = policy.sigmas(4, shape)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu" and sigmas.shape == (5,)
    assert bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0 and float(sigmas[0]) <= 1
    velocity = policy.velocity(torch.zeros(2, *shape), sigmas[1].expand(2), policy.encode(as_records(PROMPTS[:2])))
    assert velocity.shape == (2, *shape) and velocity.dtype == torch.float32


def test_it_runs_on_shapes_alone(family: str, folders: dict[str, str]) -> None:
    """So that its memory is forecast: encoded as with weights, with a velocity forward and backward, and an image, also with gradient."""
    loaded, empty = load_policy(folders[family]), load_policy(empty_pipeline(folders[family]))
    records = as_records(PROMPTS[:1])
    real, shapes = (policy.encode(records, negative=True) for policy in (loaded, empty))
    for known, found in ((real, shapes), (real.negative, shapes.negative)):
        assert known is not None and found is not None
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in known.tensors.items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()} == expected
    x, sigma = torch.empty(1, *empty.latent_shape(SIZE), device="meta"), torch.full((1,), 0.5)
    trained = [parameter for _, parameter in empty.trainable_parameters()]

    def velocity() -> Tensor:
        return empty.velocity(x, sigma, shapes, guidance_scale=3.0)

    with empty.checkpointed():
        checkpointed = update_bytes(velocity, trained)
    assert 0 < forward_bytes(velocity) < checkpointed < update_bytes(velocity, trained)
    latent = x.clone().requires_grad_()
    assert 0 < forward_bytes(lambda: empty.decode(x)) < update_bytes(lambda: empty.decode(latent, grad=True), [])
