"""The SD3 policy against diffusers' own pipeline."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import PeftModel

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import LoRA, Size, check_lora_targets, inspect_checkpoint, load_policy
from flowalign.models.families.sd3 import SD3Model
from flowalign.models.sampling import sample
from samplers import ODE, FlowSDE, Tree, chain, rollout

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
PROMPTS = ['the word "KITE" in red on a yellow background', 'the word "MOON" in blue on a white background', "a word"]


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_deterministic_rollout_is_the_pipeline_bit_for_bit(
    tiny_pipeline: Path, guidance: float, steps: int
) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none")
    noise = torch.randn(3, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS, "latents": noise, "num_inference_steps": steps, "guidance_scale": guidance, "height": 24,
            "width": 48, "max_sequence_length": 0}  # fmt: skip
    conditions = policy.encode(as_records(PROMPTS), negative=True, together=True)
    if guidance != 1.0:  # the text encoder rounds by batch size: the pipeline encodes "" three times at once, we once
        negative = conditions.negative.tensors
        call |= {"prompt": None, "prompt_embeds": conditions.tensors["embeds"], "negative_prompt_embeds": negative["embeds"],
                 "pooled_prompt_embeds": conditions.tensors["pooled"], "negative_pooled_prompt_embeds": negative["pooled"]}  # fmt: skip
        encoded = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=True, max_sequence_length=0)
        ours = (conditions.tensors["embeds"], negative["embeds"], conditions.tensors["pooled"], negative["pooled"])
        assert max(float((a - b).detach().abs().max()) for a, b in zip(ours, encoded, strict=True)) < 1e-6
    one = chain(steps, 3)
    for kernel in (ODE(), FlowSDE()):  # level 0 is the Euler step whatever the kernel
        tree = replace(one, level=torch.zeros_like(one.level))
        forest = rollout(
            lambda x, sigma, root: policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance),
            policy.start(noise), policy.sigmas(steps, noise.shape[1:]), tree, kernel, lambda tree, nodes: pytest.fail("asked for noise"),
        )  # fmt: skip
        latents = forest.at(tree.leaves)
        assert torch.equal(latents, pipeline(**call, output_type="latent").images)
    images = torch.from_numpy(pipeline(**call, output_type="np").images).permute(0, 3, 1, 2)
    assert torch.equal(policy.decode(latents), images)


def test_a_dynamically_shifted_grid_is_the_pipelines(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_shift=2.0
    )
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    policy = load_policy(str(tmp_path), trainable="none")
    for height, width in ((24, 48), (48, 48)):
        pipeline(
            PROMPTS[:1], num_inference_steps=5, guidance_scale=1.0, height=height, width=width, output_type="latent"
        )
        grid = policy.sigmas(5, policy.latent_shape(Size(height, width)))
        assert torch.equal(grid, pipeline.scheduler.sigmas)
        assert not torch.equal(grid, load_policy(str(tiny_pipeline)).sigmas(5, (3, height, width)))


# ------------------------------------------------------------------------------------------ scheduler options


def with_scheduler(folder: Path, source: Path, name: str = "FlowMatchEulerDiscreteScheduler", **options: Any) -> Path:
    """A copy of the pipeline `source` in `folder`, with another scheduler class or other options of it."""
    shutil.copytree(source, folder)
    index, settings = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", name]}))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **options}))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 1.0},
        {"num_train_timesteps": 500},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_scheduler_options_that_move_the_levels_are_followed(
    options: dict[str, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    folder = with_scheduler(tmp_path / "changed", tiny_pipeline, **options)
    plain, policy = (load_policy(str(path), trainable="none") for path in (tiny_pipeline, folder))
    assert not torch.equal(policy.sigmas(4, (3, 24, 48)), plain.sigmas(4, (3, 24, 48)))  # the option does something
    noise = torch.randn(3, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompt=PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=1.0, height=24, width=48,
                      max_sequence_length=0, output_type="latent").images  # fmt: skip
    assert torch.equal(sample(policy, policy.encode(as_records(PROMPTS), together=True), noise, 4, 1.0), theirs)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling=true; expected false"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=true; expected false"),
        ("FlowMatchHeunDiscreteScheduler", {}, "FlowMatchHeunDiscreteScheduler; expected FlowMatchEulerDiscrete"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "UniPCMultistepScheduler; expected FlowMatchEuler"),
    ],
)
def test_a_scheduler_that_samples_otherwise_is_refused_before_weights_are_read(
    name: str, options: dict[str, Any], message: str, tiny_pipeline: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = str(with_scheduler(tmp_path / "changed", tiny_pipeline, name, **options))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        load_policy(folder, trainable="none")
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [f"policy.path={folder}"])


def test_a_scheduler_put_into_a_loaded_pipeline_is_judged_alike(tiny_pipeline: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="stochastic_sampling=true; expected false"):
        SD3Model(pipeline)


def test_detaching_the_unconditional_half_keeps_the_value(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="full")
    conditions = policy.encode(as_records(PROMPTS[:1]), negative=True)
    x, sigma = torch.randn(1, 3, 24, 48), torch.tensor([0.6])
    both = policy.velocity(x, sigma, conditions, guidance_scale=3.0)
    half = policy.velocity(x, sigma, conditions, guidance_scale=3.0, detach_uncond=True)
    torch.testing.assert_close(half, both, rtol=0, atol=1e-5)
    weight = policy.modules()["transformer"].proj_out.weight
    (detached,) = torch.autograd.grad(half.sum(), weight)
    (conditional,) = torch.autograd.grad(policy.velocity(x, sigma, conditions).sum(), weight)
    torch.testing.assert_close(detached, 3.0 * conditional, rtol=1e-4, atol=1e-4)


def test_lora_targets_are_strict(tiny_pipeline: Path) -> None:
    assert len(check_lora_targets(str(tiny_pipeline), ["attn.to_q"])) == 2
    with pytest.raises(ValueError, match=r"attn\.to_k2.*attn\.to_k"):
        check_lora_targets(str(tiny_pipeline), ["attn.to_q", "attn.to_k2"])
    with pytest.raises(ValueError, match="dropout"):
        LoRA(dropout=0.1)


def test_bf16_base_with_fp32_adapters(tiny_pipeline: Path) -> None:
    lora = LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v"))
    x, sigma = torch.randn(1, 3, 24, 48, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])
    outputs = []
    for dtype in ("fp32", "bf16"):
        policy = load_policy(str(tiny_pipeline), lora=lora, dtype=dtype)
        assert {p.dtype for _, p in policy.trainable_parameters()} == {torch.float32}
        assert policy.modules()["transformer"].proj_out.weight.dtype == (
            torch.float32 if dtype == "fp32" else torch.bfloat16
        )
        outputs.append(policy.velocity(x, sigma, policy.encode(as_records(PROMPTS[:1]))))
        outputs[-1].square().mean().backward()
        norms = [float(p.grad.norm()) for name, p in policy.trainable_parameters() if "lora_B" in name]
        assert min(norms) > 0  # A has gradient 0 while B is 0
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.1, atol=0.05)


def test_peft_folder_round_trip(tiny_pipeline: Path, tmp_path: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=4, alpha=10, targets=("attn.to_q", "ff.net.2")))
    for name, parameter in policy.trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    (tmp_path / ".tmpAbCdEf").write_bytes(b"half of what a killed save wrote")
    policy.save_lora(tmp_path)
    assert not list(tmp_path.glob(".*"))
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) == 4
    fresh = SD3Transformer2DModel.from_pretrained(tiny_pipeline, subfolder="transformer")
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    x, sigma, conditions = torch.randn(1, 3, 24, 48), torch.tensor([0.6]), policy.encode(as_records(PROMPTS[:1]))
    call = {"hidden_states": x, "timestep": sigma * 1000, "encoder_hidden_states": conditions.tensors["embeds"],
            "pooled_projections": conditions.tensors["pooled"], "return_dict": False}  # fmt: skip
    ours = policy.velocity(x, sigma, conditions)
    torch.testing.assert_close(loaded(**call)[0], ours, rtol=0, atol=1e-6)
    with policy.role("reference"):
        assert not torch.allclose(policy.velocity(x, sigma, conditions), ours, atol=1e-3)


def test_reference_of_full_weights(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="full")
    with pytest.raises(ValueError, match="reference_copy"), policy.role("reference"):
        pass
    kept = load_policy(str(tiny_pipeline), trainable="full", reference_copy=True)
    x, sigma, conditions = torch.randn(1, 3, 24, 48), torch.tensor([0.6]), kept.encode(as_records(PROMPTS[:1]))
    before = kept.velocity(x, sigma, conditions)
    with torch.no_grad():
        kept.modules()["transformer"].proj_out.weight.mul_(2)
    with kept.role("reference"):
        assert torch.equal(kept.velocity(x, sigma, conditions), before)
    assert not torch.equal(kept.velocity(x, sigma, conditions), before)


def test_what_is_not_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_checkpoint(str(tmp_path / "no"))
    with pytest.raises(ValueError, match=r"model_index\.json"):
        inspect_checkpoint(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline", "_diffusers_version": "0.42"}')
    with pytest.raises(ValueError, match="PixArtAlphaPipeline"):
        inspect_checkpoint(str(tmp_path))


def test_image_size_must_divide(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none")
    assert policy.latent_shape(Size(24, 48)) == (3, 24, 48)
    with pytest.raises(ValueError, match="multiples of 4"):
        policy.latent_shape(Size(26, 48))


def test_sampler_grid_is_the_schedulers(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none")
    sigmas = policy.sigmas(5, (3, 24, 48))
    assert sigmas.dtype == torch.float32 and len(sigmas) == 6 and float(sigmas[0]) == 1.0 and float(sigmas[-1]) == 0.0
    assert Tree.cat([chain(5, 1)]).num_steps == 5
