"""Qwen-Image and its edits: what the conformance of all families cannot know."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models import LoRA, Policy, Sampling, Size, load_policy
from flowalign.models.conditions import Conditions
from flowalign.models.families.qwen_image import QwenImageModel
from flowalign.models.grid import pipeline_latents
from flowalign.models.guidance import classifier_free_apart
from flowalign.models.packing import pack_2x2, unpack_2x2
from flowalign.models.sampling import sample
from flowalign.testing import tiny_pipeline

SIZE = Size(32, 64)
SHORT, LONG = PromptRecord(0, "a word"), PromptRecord(1, "a word in red on a yellow background")


def policy_of(name: str = "qwen_image", **arguments: Any) -> Policy:
    sampling = Sampling(3, 3.0, SIZE)
    return load_policy(tiny_pipeline(name), **{"trainable": "none", "sampling": sampling, **arguments})


def states(policy: Policy, count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    return x, torch.full((count,), 0.5)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    """Of 64×32, 64×32 and 48×48 pixels."""
    paths = []
    for number, sides in enumerate(((64, 32), (64, 32), (48, 48))):
        pixels = torch.rand(sides[1], sides[0], 3, generator=torch.Generator().manual_seed(number))
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray((pixels * 255).byte().numpy()).save(paths[-1])
    return tuple(paths)


def test_tokens_are_those_of_the_pipeline_and_lead_back() -> None:
    latents = torch.randn(2, 16, 6, 10)
    tokens = pack_2x2(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack_2x2(tokens, 6, 10), latents)


def test_guidance_keeps_the_norm_of_every_token() -> None:
    """Against its formula by hand: u + w (c - u), each 2×2 square of all channels scaled to the norm of c."""
    policy = policy_of()
    x, sigma = states(policy, 2)
    conditions = policy.encode([SHORT, LONG], negative=True)
    assert conditions.negative is not None
    c, u = (policy.velocity(x, sigma, each) for each in (conditions, conditions.negative))
    guided = policy.velocity(x, sigma, conditions, guidance_scale=4.0)
    plain = u + 4.0 * (c - u)
    norms = [
        v.unfold(2, 2, 2)
        .unfold(3, 2, 2)
        .square()
        .sum((1, 4, 5))
        .sqrt()
        .repeat_interleave(2, 1)
        .repeat_interleave(2, 2)[:, None]
        for v in (c, plain)
    ]
    torch.testing.assert_close(guided, plain * norms[0] / norms[1], rtol=1e-4, atol=1e-6)
    assert float((guided - plain).norm() / plain.norm()) > 1e-3


def test_the_unconditional_call_has_no_gradient_where_it_is_detached() -> None:
    """With v = a·x of its own a for each half: dv/da_u is (1 - w)·x or 0, dv/da_c is w·x."""
    a, x, sigma = torch.tensor([2.0, 3.0], requires_grad=True), torch.ones(1, 2, 4), torch.ones(1)
    positive, negative = (Conditions({"number": torch.tensor([number])}) for number in (0, 1))

    def predict(x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return a[conditions.tensors["number"]] * x

    for detach, expected in ((False, [8 * 5.0, 8 * -4.0]), (True, [8 * 5.0, 0.0])):
        v = classifier_free_apart(predict, x, sigma, positive, negative, 5.0, detach)
        assert torch.equal(v.detach(), torch.full_like(x, 3 + 5.0 * (2 - 3)))
        assert torch.autograd.grad(v.sum(), a)[0].tolist() == expected
    with pytest.raises(ValueError, match="no negative rows"):
        classifier_free_apart(predict, x, sigma, positive, None, 5.0, False)


@pytest.mark.parametrize("fixed_length", [False, True])
def test_a_velocity_does_not_see_the_padding_or_the_other_prompts(fixed_length: bool) -> None:
    exact, policy = policy_of(), policy_of(options={"fixed_length": fixed_length})
    x, sigma = states(policy, 2)
    both = policy.velocity(x, sigma, policy.encode([SHORT, LONG]))
    for row, record in enumerate((SHORT, LONG)):
        alone = exact.velocity(x[row : row + 1], sigma[:1], exact.encode([record]))
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=2e-6)
    assert float((exact.velocity(x[:1], sigma[:1], exact.encode([LONG])) - both[:1]).abs().max()) > 1e-4


def test_with_a_fixed_length_all_calls_have_one_shape() -> None:
    seen: dict[bool, set[tuple[int, ...]]] = {}
    for fixed in (False, True):
        policy: Any = policy_of(options={"fixed_length": fixed})
        shapes = seen.setdefault(fixed, set())
        policy.modules()["transformer"].register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.add(kwargs["encoder_hidden_states"].shape),
            with_kwargs=True,
        )
        x, sigma = states(policy, 1)
        for record in (SHORT, LONG):
            policy.velocity(x, sigma, policy.encode([record]))
    assert len(seen[False]) == 2 and len(seen[True]) == 1


def test_an_empty_negative_prompt_guides_as_in_the_pipeline() -> None:
    policy, sampling = policy_of(), Sampling(3, 4.0, SIZE)
    noise, _ = states(policy, 2)
    inputs = policy.pipeline_inputs([SHORT, LONG], 4.0, SIZE)
    assert inputs["negative_prompt"] == ["", ""]
    assert "negative_prompt" not in {
        **policy.pipeline_inputs([SHORT], 1.0, SIZE),
        **policy.pipeline_arguments(1.0, SIZE),
    }
    ours = sample(policy, policy.encode([SHORT, LONG], negative=True, together=True), noise, 3, 4.0)
    assert torch.equal(ours, pipeline_latents(tiny_pipeline("qwen_image"), policy, [SHORT, LONG], noise, sampling))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_several_source_images_each_have_their_own_aspect_ratio(zero_cond_t: bool, images: tuple[Path, ...]) -> None:
    """The latents of the pipeline, also of a network that sees source images without noise (the checkpoint 2511)."""
    pipeline = tiny_pipeline("qwen_image_edit_plus")
    if zero_cond_t:
        kind, config = type(pipeline.transformer), {**pipeline.transformer.config, "zero_cond_t": True}
        torch.manual_seed(0)
        pipeline.transformer = kind.from_config(config).eval()
    sampling = Sampling(2, 3.0, SIZE)
    policy = load_policy(pipeline, trainable="none", sampling=sampling)
    record = PromptRecord(0, "both", images=images[1:], negative_prompt="one")
    conditions = policy.encode([record], negative=True)
    sides = [tuple(conditions.tensors[f"source_{number}"].shape[-2:]) for number in (0, 1)]
    assert sides == [(46, 90), (64, 64)]  # a million pixels each, 16 to a latent
    noise, _ = states(policy, 1)
    assert torch.equal(
        sample(policy, conditions, noise, 2, 3.0), pipeline_latents(pipeline, policy, [record], noise, sampling)
    )


def test_prompts_with_source_images_of_other_shapes_are_refused_together(images: tuple[Path, ...]) -> None:
    policy = policy_of("qwen_image_edit_plus")
    records = [
        PromptRecord(uid, "x", images=own) for uid, own in enumerate((images[:1], images[1:2], images[2:], images[:2]))
    ]
    policy.encode(records[:2])
    for other in records[2:]:
        for together in (False, True):
            with pytest.raises(ValueError, match="equally many source images of one aspect ratio"):
                policy.encode([records[0], other], together=together)
    with pytest.raises(ValueError, match="got 2 records"):
        policy.pipeline_inputs(records[:2], 1.0, SIZE)


def test_an_edit_sees_its_image_in_both_ways(images: tuple[Path, ...]) -> None:
    """The image changes what the text encoder says and the latents beside the state; each of the two changes the velocity."""
    policy = policy_of("qwen_image_edit")
    one, other = (policy.encode([PromptRecord(0, "x", images=(path,))]).tensors for path in images[:2])
    x, sigma = states(policy, 1)
    base = policy.velocity(x, sigma, Conditions(one))
    for part in ("embeds", "source_0"):
        changed = policy.velocity(x, sigma, Conditions({**one, part: other[part]}))
        assert float((changed - base).abs().max()) > 1e-6, part


def test_what_it_cannot_be_is_refused(images: tuple[Path, ...]) -> None:
    pipeline = tiny_pipeline("qwen_image")
    with pytest.raises(ValueError, match="expected 1 to 1024"):
        QwenImageModel(pipeline, 1025)
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="guidance_embeds"):
        QwenImageModel(pipeline)
    record = PromptRecord(0, "long " * 20, images=images[:1])
    with pytest.raises(ValueError, match="tokens beside those of its images"):
        policy_of("qwen_image_edit", max_sequence_length=100).encode([record])


def test_a_lora_of_it_keeps_its_alpha(tmp_path: Path) -> None:
    policy = policy_of(trainable="lora", lora=LoRA(rank=2, alpha=8))
    for _, parameter in policy.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save_lora(tmp_path)
    plain = tiny_pipeline("qwen_image")
    plain.load_lora_weights(tmp_path)
    x, sigma = states(policy, 1)
    conditions = policy.encode([SHORT])
    theirs = load_policy(plain, trainable="none").velocity(x, sigma, conditions)
    torch.testing.assert_close(theirs, policy.velocity(x, sigma, conditions), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 8
