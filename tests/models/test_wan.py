"""What Wan does beside the contract that every family keeps: two networks, their guidance, timesteps, and its first frame."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from flowalign.diagnostics.doctor import diagnose
from flowalign.models import LoRA, Sampling, Size, load_policy
from flowalign.models.families import wan
from flowalign.models.flow_multistep import flow_multistep_sigmas
from flowalign.models.grid import pipeline_call, pipeline_latents
from flowalign.models.load import read_pipeline
from flowalign.models.sampling import sample
from flowalign.testing import tiny_pipeline
from tests.helpers.families import subject
from tests.helpers.tiny_run import CONFIG

LEVELS = torch.tensor([0.3125, 0.9375, 0.875, 0.8749])  # timesteps 312, 937, 875, 874: low, high, high, low


def watched(policy: Any) -> list[tuple[str, Tensor]]:
    """From now on: (network, timesteps) of each call."""
    calls: list[tuple[str, Tensor]] = []
    for name, network in policy.modules().items():
        network.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, args[1])), with_kwargs=True
        )
    return calls


def state(policy: Any, rows: int) -> Tensor:
    return torch.randn(rows, *policy.latent_shape(subject("wan22").size), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_boundary_deals_the_rows_of_a_call() -> None:
    """Each row is answered by its own network, at its own place, and counts twice with guidance."""
    family = subject("wan22")
    policy: Any = family.policy(trainable="none")
    conditions, x = policy.encode(family.records(3), negative=True).rows(torch.tensor([0, 1, 2, 0])), state(policy, 4)
    calls = watched(policy)
    together = policy.velocity(x, LEVELS, conditions, guidance_scale=3.0)
    assert policy.evaluations == 8 == 4 * policy.rows_per_state(3.0)
    assert [(name, timesteps.tolist()) for name, timesteps in calls] == [
        ("transformer", [937, 875]), ("transformer", [937, 875]),
        ("transformer_2", [312, 874]), ("transformer_2", [312, 874]),
    ]  # fmt: skip
    assert all(timesteps.dtype == torch.int64 for _, timesteps in calls)
    for row in range(4):
        index = torch.tensor([row])
        alone = policy.velocity(x[index], LEVELS[index], conditions.rows(index), guidance_scale=3.0)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_second_scale_reaches_only_the_network_of_low_noise() -> None:
    """v_u + w·(v_c - v_u) with w = 3 above the boundary and 6 below; without guidance it is of no use, as in the pipeline."""
    family = subject("wan22")
    policy, second = family.policy(trainable="none"), family.policy(trainable="none", options={"guidance_scale_2": 6.0})
    conditions, x = (
        policy.encode(family.records(3)[:2], negative=True).rows(torch.tensor([0, 1, 0, 1])),
        state(policy, 4),
    )
    assert conditions.negative is not None
    plain, uncond = (policy.velocity(x, LEVELS, rows) for rows in (conditions, conditions.negative))
    scale = torch.tensor([6.0, 3.0, 3.0, 6.0]).reshape(-1, 1, 1, 1, 1)
    guided = second.velocity(x, LEVELS, conditions, guidance_scale=3.0)
    torch.testing.assert_close(guided, uncond + scale * (plain - uncond), rtol=1e-5, atol=1e-5)
    assert torch.equal(second.velocity(x, LEVELS, conditions), plain)
    assert second.pipeline_arguments(3.0, family.size)["guidance_scale_2"] == 6.0
    assert "guidance_scale_2" not in policy.pipeline_arguments(3.0, family.size)


def test_with_a_second_scale_it_is_still_the_pipelines_call() -> None:
    family, sampling = subject("wan22"), Sampling(4, 3.0, subject("wan22").size)
    policy = family.policy(trainable="none", sampling=sampling, options={"guidance_scale_2": 6.0})
    records, noise = family.records(2), state(policy, 2)
    with torch.no_grad():
        theirs = pipeline_latents(
            family.pipeline(pipeline_call(policy, sampling)[0], policy), policy, records, noise, sampling
        )
    conditions = policy.encode(records, negative=True, together=True)
    assert torch.equal(sample(policy, conditions, noise, 4, 3.0), theirs)


@pytest.mark.parametrize(
    ("name", "scale"), [("wan21", 2.0), ("wan22", 1.0), ("wan22", float("inf")), ("wan22", float("nan"))]
)
def test_a_second_scale_that_the_pipeline_could_not_follow_is_refused(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match=r"got guidance_scale_2=.* expected a number above 1"):
        load_policy(tiny_pipeline(name), trainable="none", options={"guidance_scale_2": scale})


def test_an_update_trains_the_network_of_its_level_alone() -> None:
    family = subject("wan22")
    policy: Any = family.policy(lora=LoRA(rank=2, alpha=2))
    conditions = policy.encode(family.records(1))
    for level, used in ((0.9, "transformer"), (0.3, "transformer_2")):
        policy.velocity(state(policy, 1), torch.tensor([level]), conditions).square().sum().backward()
        reached = {name.split(".")[0] for name, p in policy.trainable_parameters() if p.grad is not None}
        assert reached == {used}
        for _, parameter in policy.trainable_parameters():
            parameter.grad = None


def test_grids_whose_timesteps_are_not_cut_off_levels_are_refused() -> None:
    """With flow_shift=1 the scheduler's float64 level and its fp32 rounding fall on two sides of a whole timestep."""
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    own, other = (UniPCMultistepScheduler(flow_shift=shift, **settings) for shift in (3.0, 1.0))
    for steps in range(1, 51):
        own.set_timesteps(steps)
        assert torch.equal(flow_multistep_sigmas(own, steps), own.sigmas)
    refused = []
    for steps in range(1, 51):
        try:
            flow_multistep_sigmas(other, steps)
        except ValueError as error:
            assert f"got num_inference_steps={steps} with flow_shift=1.0" in str(error)
            refused.append(steps)
    assert refused


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "and transformer_2 and boundary_ratio=None"),
        ({"boundary_ratio": 0.9}, "with transformer and boundary_ratio=0.9"),
        ({"transformer": [None, None]}, "with no network"),
    ],
)
def test_networks_without_a_boundary_and_a_boundary_without_networks_are_refused(
    changed: dict[str, Any], said: str
) -> None:
    index = {"transformer": ["diffusers", "WanTransformer3DModel"]}  # as Wan 2.1's, which names no second one
    assert list(wan.FAMILY.of(index).networks) == ["transformer"]
    with pytest.raises(ValueError, match=said):
        wan.FAMILY.of({**index, **changed})


def test_image_to_video_checkpoints_that_would_be_sampled_wrongly_are_refused() -> None:
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "expand_timesteps": True}
    with pytest.raises(ValueError, match="expand_timesteps=true"):
        wan.IMAGE_TO_VIDEO.of(index)
    pipeline = tiny_pipeline("wan21_i2v")
    pipeline.transformer.register_to_config(pos_embed_seq_len=10)
    with pytest.raises(ValueError, match="a first and a last frame"):
        load_policy(pipeline, trainable="none")


@pytest.mark.parametrize(("option", "value"), [("solver_order", 3), ("solver_type", "bh1"), ("use_flow_sigmas", False)])
def test_schedulers_with_other_steps_are_refused(option: str, value: Any) -> None:
    released = {"_class_name": "UniPCMultistepScheduler", **wan._tiny()["scheduler"][1]}
    assert wan.FAMILY.path(released).rectified
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        wan.FAMILY.path({**released, option: value})
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler; expected UniPC"):
        wan.FAMILY.path({**released, "_class_name": "FlowMatchEulerDiscreteScheduler"})


@torch.no_grad()
def test_the_first_frame_is_of_the_size_generated_and_kept_once() -> None:
    """A mask of 4 channels and the latents; negative rows have none of their own but get those of their row."""
    family = subject("wan22_i2v")
    policy: Any = family.policy(trainable="none")
    for size in (Size(32, 64, 5), Size(64, 32, 9)):
        conditions = policy.encode(family.records(2), negative=True, size=size)
        frames, height, width = policy.latent_shape(size)[1:]
        source = conditions.tensors["first_frame"]
        assert source.shape == (2, 20, frames, height, width)
        assert bool((source[:, :4, 0] == 1).all()) and not bool(source[:, :4, 1:].any())
        assert not torch.equal(source[0, 4:], source[1, 4:])
        assert conditions.negative is not None and list(conditions.negative.tensors) == ["embeds"]
    x, sigma = torch.randn(2, *policy.latent_shape(size)), torch.tensor([0.95, 0.5])
    swapped = replace(conditions, tensors={**conditions.tensors, "first_frame": source.flip(0)})
    own, other = (policy.velocity(x, sigma, each, guidance_scale=2.0) for each in (conditions, swapped))
    assert not torch.allclose(own, other, atol=1e-4)
    with pytest.raises(ValueError, match="got 2 prompts with source images"):
        policy.pipeline_inputs(family.records(2), 1.0, size)


def test_both_adapters_come_back_in_plain_diffusers_and_in_a_policy(tmp_path: Path) -> None:
    family = subject("wan22")
    sampling = Sampling(4, 3.0, family.size)
    policy: Any = family.policy(lora=LoRA(rank=2, alpha=6), sampling=sampling)
    for number, (_, parameter) in enumerate(policy.trainable_parameters()):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    policy.save_lora(tmp_path)
    pipeline = read_pipeline(family.folder)
    exec("\n".join(family.family.load_lora(repr(str(tmp_path)))), {"pipe": pipeline})
    records, noise = family.records(2), state(policy, 2)
    with torch.no_grad():
        theirs = pipeline_latents(pipeline, policy, records, noise, sampling)
        conditions = policy.encode(records, negative=True, together=True)
        ours = sample(policy, conditions, noise, 4, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    again = load_policy(family.folder, lora=str(tmp_path))
    pairs = zip(policy.trainable_parameters(), again.trainable_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


@pytest.mark.slow
def test_the_doctor_finds_both_networks_healthy() -> None:
    """Also that every adapter is reached, though a state reaches those of one network only."""
    reward = "{class_path: rewards.OnFrames, init_args: {reward: rewards.JPEGCompressibility}}"
    size = subject("wan22").size
    findings = diagnose(CONFIG, [
        f"policy.path={subject('wan22').folder}", "policy.lora.targets=null", f"policy.height={size.height}",
        f"policy.width={size.width}", f"policy.frames={size.frames}", "policy.fps=16", f"reward={reward}",
        f"evaluation.rewards=[{reward}]", "rollout.num_inference_steps=4", "rollout.plan=samplers.Chain",
    ])  # fmt: skip
    assert [str(finding) for finding in findings if finding.ok is not True] == []
