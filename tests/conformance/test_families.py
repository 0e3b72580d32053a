"""Every model family in flowalign/models/families keeps the contract of `Model`, shown by its tiny pipelines."""

import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models import LoRA, Sampling, Size, check_lora_targets, families, load_policy, path_of
from flowalign.models.checkpoints import FAMILIES
from flowalign.models.checks import check_image_size, rows_per_state
from flowalign.models.empty_pipeline import empty_pipeline
from flowalign.models.grid import pipeline_call, pipeline_latents
from flowalign.models.live_bytes import forward_bytes, update_bytes
from flowalign.models.sampling import sample
from flowalign.testing import tiny_names
from samplers import Listed, PlainShift, Schedule, check_schedule
from tests.helpers.families import Subject, parity, subject

NAMES = tiny_names()
Note = Callable[..., None]
# of one family in `make test`, of all in `make test-all`
thorough = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "sd3" else pytest.mark.slow) for name in NAMES], indirect=True
)


def compared(family: Subject, sampling: Sampling, noise_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean latents of the policy, and of the pipeline's own call, set up as the run's report tells its user."""
    policy = family.policy(trainable="none", sampling=sampling)
    records = family.records(family.together)
    noise = torch.randn(
        len(records), *policy.latent_shape(sampling.size), generator=torch.Generator().manual_seed(noise_seed)
    )
    pipeline = family.pipeline(pipeline_call(policy, sampling)[0], policy)
    with torch.no_grad():
        theirs = pipeline_latents(pipeline, policy, records, noise, sampling)
    rows = policy.rows_per_state(sampling.guidance_scale)
    conditions = policy.encode(records, negative=rows > 1, together=True)
    ours = sample(policy, conditions, noise, sampling.num_inference_steps, sampling.guidance_scale, sampling.schedule)
    assert policy.evaluations == len(records) * sampling.num_inference_steps * rows
    assert rows == rows_per_state(family.folder, sampling.guidance_scale)
    assert float((theirs - noise).norm()) > 1e-3 * float(noise.norm())  # it did something
    return ours, theirs


def test_every_module_has_a_tiny_pipeline() -> None:
    modules = {path.split(".")[-2] for path in FAMILIES.values()}
    assert modules == {module.name for module in pkgutil.iter_modules(families.__path__)}
    assert {subject(name).family.pipeline.__name__ for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("steps", "guidance"),
    [(1, 1.0), (4, 3.0), pytest.param(1, 3.0, marks=pytest.mark.slow), pytest.param(4, 1.0, marks=pytest.mark.slow)],
)
def test_the_deterministic_rollout_is_the_pipelines(family: Subject, steps: int, guidance: float, note: Note) -> None:
    """One step is refused where the pipeline's own level would be 0/0."""
    if steps == 1 and family.scheduler.get("shift_terminal"):
        policy = family.policy(trainable="none")
        with pytest.raises(ValueError, match="at least 2 steps"):
            policy.sigmas(1, policy.latent_shape(family.size))
        return
    note("parity", parity(family, *compared(family, Sampling(steps, guidance, family.size))))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_so_it_is_at_other_sizes_and_numbers_of_frames(family: Subject, number: int, note: Note) -> None:
    note("parity", parity(family, *compared(family, Sampling(3, 2.0, family.sizes[number]))))


@thorough
@pytest.mark.parametrize("schedule", [PlainShift(1.7), Listed((1.0, 0.9, 0.31, 0.123))], ids=str)
def test_the_exported_call_steps_over_the_levels_of_a_schedule(family: Subject, schedule: Schedule, note: Note) -> None:
    """Difference 0 to our rollout: the pipeline's scheduler would shift the levels again. Or the schedule is refused, here
    and before loading."""
    sampling, policy = Sampling(4, 1.0, family.size, schedule), family.policy(trainable="none")
    try:
        setup, _ = pipeline_call(policy, sampling)
    except ValueError as error:
        assert "levels" in str(error)
        with pytest.raises(ValueError, match="schedule"):
            check_schedule(schedule, 4, path_of(family.folder), family.family.takes_levels)
        note("levels", "its own only")
        return
    note("levels", parity(family, *compared(family, sampling)))
    plain = Sampling(4, 1.0, family.size)
    assert setup != pipeline_call(policy, plain)[0] == policy.pipeline_setup()


@thorough
def test_sizes_are_accepted_before_and_after_loading_alike_and_decode_gives_them(family: Subject, note: Note) -> None:
    policy, accepted, video = family.policy(trainable="none"), 0, family.size.frames > 1
    for height, width, frames in (
        (32, 64, 1),
        (64, 32, 5),
        (34, 64, 1),
        (32, 60, 1),
        (33, 33, 1),
        (0, 64, 1),
        (32, 64, 4),
    ):
        size = Size(height, width, frames)
        try:
            shape = policy.latent_shape(size)
        except ValueError as error:
            said = str(error)
            assert f"got image size {height}×{width}; expected" in said or f"got {frames} frames" in said
            with pytest.raises(ValueError, match=said[:20]):
                check_image_size(family.folder, size)
            continue
        check_image_size(family.folder, size)
        images = policy.decode(torch.zeros(2, *shape))
        assert images.shape == ((2, frames, 3, height, width) if video else (2, 3, height, width))
        assert images.dtype == torch.float32 and float(images.min()) >= 0 and float(images.max()) <= 1
        accepted += 1
    assert accepted == 2 if video else 1 <= accepted < 4
    note("sizes")


@thorough
def test_images_are_the_pipelines_and_encode_images_leads_back(family: Subject, note: Note) -> None:
    """The pipeline's own decoding of the same latents; encoded again, the latents are those of `latent_shape`."""
    sampling = Sampling(2, 1.0, family.size)
    policy: Any = family.policy(trainable="none", sampling=sampling)
    records, size = family.records(1), family.size
    noise = torch.randn(1, *policy.latent_shape(size), generator=torch.Generator().manual_seed(0))
    setup, arguments = pipeline_call(policy, sampling)
    inputs = policy.pipeline_inputs(records, 1.0, size)
    with torch.no_grad():
        theirs = family.pipeline(setup, policy)(
            **{**arguments, **inputs}, latents=policy.to_pipeline(noise), output_type="pt", return_dict=False
        )[0]
    ours = policy.decode(sample(policy, policy.encode(records, together=True), noise, 2, 1.0))
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-6)
    with torch.no_grad():
        latents = policy.encode_images(ours)
        rebuilt = policy.model.decode(latents)
    assert (
        latents.shape[1:] == policy.latent_shape(size) and latents.dtype == torch.float32 and not latents.requires_grad
    )
    assert rebuilt.shape == ours.shape
    for wrong, said in (
        (ours[..., :1, :, :], "shape"), (ours[0, ..., 0], "shape"), (ours + 2, "pixels in"), (ours / 0, "pixels in"),
        (ours[..., :-1, :], "size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            policy.encode_images(wrong)
    note("images", float((ours - theirs.float()).abs().max()))


@thorough
def test_encode_gives_one_row_per_prompt_in_their_order(family: Subject, note: Note) -> None:
    policy, records = family.policy(trainable="none", sampling=Sampling(4, 1.0, family.size)), family.records(3)
    conditions = policy.encode([*records, records[0]])
    assert len(conditions) == 4 and all(len(tensor) == 4 for tensor in conditions.tensors.values())
    assert all(torch.equal(tensor[0], tensor[3]) for tensor in conditions.tensors.values())
    assert any(not torch.equal(tensor[0], tensor[1]) for tensor in conditions.tensors.values())
    backwards = policy.encode(records[::-1]).tensors
    assert all(torch.equal(backwards[name].flip(0), tensor[:3]) for name, tensor in conditions.tensors.items())
    note("encode")


def test_the_default_lora_targets_match_and_all_of_it_is_trained(family: Subject, note: Note) -> None:
    modules = check_lora_targets(family.folder, None)
    assert all(check_lora_targets(family.folder, [target]) for target in family.family.targets)
    names = [name for name, _ in family.policy(lora=LoRA(rank=2, alpha=2)).trainable_parameters()]
    assert len(names) == 2 * len(modules) and all(any(f"{m}.lora_" in name for m in modules) for name in names)
    note("LoRA layers", len(modules))


@thorough
def test_levels_and_path_are_known_from_the_configurations(family: Subject, note: Note) -> None:
    policy = family.policy(trainable="none", sampling=Sampling(4, 1.0, family.size))
    assert type(path_of(family.folder)) is type(policy.path)
    shape = policy.latent_shape(family.size)
    sigmas = policy.sigmas(4, shape)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu" and sigmas.shape == (5,)
    assert bool((sigmas.diff() < 0).all()) and float(sigmas[-1]) >= 0 and float(sigmas[0]) <= 1
    velocity = policy.velocity(torch.zeros(2, *shape), sigmas[1].expand(2), policy.encode(family.records(2)))
    assert velocity.shape == (2, *shape) and velocity.dtype == torch.float32
    note("grid")


@thorough
def test_it_runs_on_shapes_alone(family: Subject, note: Note) -> None:
    """So that its memory is forecast: encoded as with weights, with a velocity forward and backward, and an image, also with gradient."""
    sampling = Sampling(4, 3.0, family.size)
    loaded = load_policy(family.folder, sampling=sampling)
    empty = load_policy(empty_pipeline(family.folder), sampling=sampling)
    negative = loaded.rows_per_state(3.0) > 1
    real, shapes = (policy.encode(family.records(1), negative=negative) for policy in (loaded, empty))
    for known, found in ((real, shapes), (real.negative, shapes.negative)):
        assert (known is None) == (found is None) == (known is real.negative and not negative)
        if known is not None and found is not None:
            expected = {name: (tensor.shape, tensor.dtype) for name, tensor in known.tensors.items()}
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.tensors.items()} == expected
    x, sigma = torch.empty(1, *empty.latent_shape(family.size), device="meta"), torch.full((1,), 0.5)
    trained = [parameter for _, parameter in empty.trainable_parameters()]

    def velocity() -> Tensor:
        return empty.velocity(x, sigma, shapes, guidance_scale=3.0)

    with empty.checkpointed():
        checkpointed = update_bytes(velocity, trained)
    assert 0 < forward_bytes(velocity) < checkpointed < update_bytes(velocity, trained)
    latent = x.clone().requires_grad_()
    assert 0 < forward_bytes(lambda: empty.decode(x)) < update_bytes(lambda: empty.decode(latent, grad=True), [])
    note("shapes alone")
