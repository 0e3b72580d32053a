"""The SD1.5 policy against diffusers' own pipeline under DDIM, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from flowalign import models
from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import Size, check_lora_targets, load_policy, path_of
from flowalign.models.families.sd15 import SD15Model
from samplers import DDIM, ODE, RectifiedFlow, VariancePreserving
from tests.helpers.sd15_calls import PROMPTS, SHAPE, ddim_pipeline, deterministic, noise_of, relative
from tests.helpers.tiny import tiny_sd15

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny_sd15.yaml")


# ------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize(
    ("changed", "bound"),
    [({}, 1e-6), ({"set_alpha_to_one": True}, 1e-6), ({"prediction_type": "v_prediction"}, 2e-6)],
    ids=["released", "to-clean-data", "v-prediction"],
)
def test_the_deterministic_rollout_is_the_pipeline_under_ddim(
    changed: dict[str, Any], bound: float, tmp_path: Path
) -> None:
    """‖ours - theirs‖ ≤ bound·‖theirs‖ for the latents of a whole call, fp32: the network sees equal inputs, the step's
    operations differ in order (one affine map in place of x̂0 and ε̂). Up to 50 steps 5e-7 were seen, 9e-7 for v."""
    folder = tiny_sd15(tmp_path, **changed)
    policy, pipeline = load_policy(str(folder), trainable="none"), ddim_pipeline(folder)
    conditions = policy.encode(as_records(PROMPTS), negative=True)
    embeds, negative = conditions.tensors["embeds"], conditions.negative.tensors["embeds"]
    # the text encoder rounds by batch size: the pipeline encodes three texts at once, we each alone
    for mine, other in zip((embeds, negative), pipeline.encode_prompt(PROMPTS, "cpu", 1, True), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    for steps, guidance in ((1, 1.0), (4, 1.0), (4, 5.0), (7, 5.0), (20, 1.0), (20, 5.0)):
        call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": noise_of(3), "height": 24,
                "width": 48, "num_inference_steps": steps, "guidance_scale": guidance}  # fmt: skip
        theirs = pipeline(**call, output_type="latent").images
        for kernel in (ODE().bind(policy.path), DDIM().bind(policy.path)):  # level 0 is DDIM with η = 0
            ours = deterministic(policy, kernel, noise_of(3), steps, guidance)
            assert relative(ours, theirs) <= bound, (steps, guidance)
    pipeline.vae.requires_grad_(False)  # as the policy's: torch picks its convolutions by it, also under no_grad
    images = torch.from_numpy(pipeline(**call, output_type="np").images).permute(0, 3, 1, 2)
    assert torch.equal(policy.decode(theirs), images)


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"beta_schedule": "linear"},
        {"trained_betas": torch.linspace(1e-4, 0.02, 1000).tolist()},
        {"num_train_timesteps": 500},
        {"steps_offset": 0},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=["trailing", "linspace", "betas-linear", "betas-given", "500-timesteps", "offset-0", "zero-snr"],
)
def test_scheduler_options_are_followed_or_refused(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_sd15(tmp_path, **options)
    policy, pipeline = load_policy(str(folder), trainable="none"), ddim_pipeline(folder)
    call = {"prompt_embeds": policy.encode(as_records(PROMPTS)).tensors["embeds"], "latents": noise_of(3), "height": 24, "width": 48,
            "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}  # fmt: skip
    if options.get("timestep_spacing") == "linspace":  # DDIM steps by K//T from timesteps that lie (K-1)/(T-1) apart
        with pytest.raises(ValueError, match="got num_inference_steps=4 with timestep_spacing=linspace"):
            policy.sigmas(4, SHAPE)
    else:
        ours = deterministic(policy, ODE().bind(policy.path), noise_of(3), 4, 1.0)
        assert relative(ours, pipeline(**call).images) <= 1e-6


def test_the_stochastic_step_is_the_schedulers(tiny_sd15_pipeline: Path) -> None:
    policy, pipeline = load_policy(str(tiny_sd15_pipeline), trainable="none"), ddim_pipeline(tiny_sd15_pipeline)
    scheduler, sigmas, conditions = pipeline.scheduler, policy.sigmas(5, SHAPE), policy.encode(as_records(PROMPTS))
    scheduler.set_timesteps(5)
    for step, timestep in enumerate(scheduler.timesteps):
        x, z = noise_of(3, step), noise_of(3, 100 + step)
        with torch.no_grad():
            eps = pipeline.unet(x, timestep, conditions.tensors["embeds"]).sample
            v = policy.velocity(x, sigmas[step].expand(3), conditions)
        theirs = scheduler.step(eps, timestep, x, eta=0.8, variance_noise=z).prev_sample
        ours = DDIM(eta=0.8).bind(policy.path)(x, v, sigmas[step], sigmas[step + 1])
        assert relative(ours.sample(z), theirs) <= 1e-6
        assert float(ours.std[0]) > 0.01  # also in the last step, which ends at timestep 0
    torch.testing.assert_close(policy.path.noise_from_velocity(x, v, sigmas[step].expand(3)), eps, rtol=0, atol=1e-5)


def test_ddim_golden_values() -> None:
    """DDIM (arXiv:2010.02502, eq. 12 and 16): ᾱ = .5, ᾱ' = .8, η = .6, x = .3, ε = .4 or v = .25, in float64."""
    path = VariancePreserving(torch.tensor([0.8, 0.5], dtype=torch.float64))
    x, eps, end = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.3, 0.4, 0.5))
    for v, mean, log_prob in (
        (path.velocity_from_noise(x, eps, 1.0), 0.17454223, -0.44031922),
        (torch.full_like(x, 0.25), 0.18022459, -0.40637061),
    ):
        step = DDIM(eta=0.6).bind(path)(x, v, 1.0, 0.5)
        assert float(step.mean) == pytest.approx(mean, abs=1e-8)
        assert float(step.std) == pytest.approx(0.23237900, abs=1e-8)
        assert float(step.log_prob(end)) == pytest.approx(log_prob, abs=1e-7)


@pytest.mark.parametrize("steps", [3, 4, 50, 999])
def test_the_levels_are_the_released_schedulers_timesteps(steps: int, tiny_sd15_pipeline: Path) -> None:
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    released = PNDMScheduler.from_pretrained(tiny_sd15_pipeline, subfolder="scheduler")
    released.set_timesteps(steps)
    expected = released.timesteps.unique().flip(0)  # PNDM evaluates the second one twice
    assert torch.equal((policy.sigmas(steps, SHAPE)[:-1] * 1000).round().long() - 1, expected)
    assert policy.sigmas(steps, SHAPE).dtype == torch.float32 and float(
        policy.sigmas(steps, SHAPE)[-1]
    ) == pytest.approx(0.001)


def test_guidance_is_one_call_of_both_halves_and_counts_two(
    tiny_sd15_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    conditions, x, sigma = policy.encode(as_records(PROMPTS), negative=True), noise_of(3), torch.full((3,), 0.502)
    batches: list[int] = []
    policy.modules()["unet"].register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    policy.velocity(x, sigma, conditions)
    policy.velocity(x, sigma, conditions, guidance_scale=5.0)
    assert batches == [3, 6] and policy.evaluations == 9
    deterministic(policy, ODE().bind(policy.path), x, 4, 5.0)
    assert policy.evaluations == 9 + 3 * 4 * 2
    assert policy.encoded == len(PROMPTS) + 1  # each text once, the negative one included


# ------------------------------------------------------------------------------------------ bad input


def test_bad_configurations_are_named_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tiny_sd15(tmp_path / "good")
    clipped, thresholded, sample, euler, unknown = (
        tiny_sd15(tmp_path / name, **changed)
        for name, changed in {
            "clipped": {"clip_sample": True},
            "thresholded": {"thresholding": True},
            "sample": {"prediction_type": "sample"},
            "euler": {"_class_name": "EulerDiscreteScheduler"},
            "snr": {"rescale_betas_zero_snr": True},
        }.items()
    )
    inpainting = tiny_sd15(tmp_path / "inpainting")
    index = inpainting / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    monkeypatch.setattr(
        models.load.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    for folder, overrides, named in (
        (clipped, [], "clip_sample=True"),
        (thresholded, [], "thresholding=True"),
        (sample, [], "prediction_type=sample"),
        (euler, [], "EulerDiscreteScheduler"),
        (unknown, [], "rescale_betas_zero_snr"),
        (inpainting, [], "StableDiffusionInpaintPipeline"),
        (good, ["policy.lora.targets=[attn1.to_q,attn1.to_qq]"], "attn1.to_q"),
        (good, ["rollout.kernel=samplers.FlowSDE"], "got FlowSDE for a policy on VariancePreserving"),
        (good, ["rollout.kernel=samplers.ODE"], "noise"),
        (good, ["rollout.kernel.eta=2"], "eta=2"),
        (good, ["rollout.kernel.eta=0"], "noise"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(CONFIG, [f"policy.path={folder}", *overrides])
        assert named in str(caught.value)
    config, plain = load_config(CONFIG, [f"policy.path={good}"])
    assert config.rollout.kernel == DDIM() and "path" in str(plain["rollout"]["kernel"])


def test_a_flow_policy_refuses_ddim(tiny_pipeline: Path) -> None:
    assert path_of(str(tiny_pipeline)) == RectifiedFlow()
    with pytest.raises(ValueError, match="VariancePreserving"):
        DDIM().bind(RectifiedFlow())
    with pytest.raises(ValueError, match="without a path"):
        DDIM()(noise_of(1), noise_of(1), 0.5, 0.25)


def test_what_the_policy_itself_refuses(tiny_sd15_pipeline: Path, tmp_path: Path) -> None:
    assert len(check_lora_targets(str(tiny_sd15_pipeline), None)) == 32
    with pytest.raises(ValueError, match="max_sequence_length"):
        load_policy(str(tiny_sd15_pipeline), max_sequence_length=77)
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    assert policy.latent_shape(Size(24, 48)) == SHAPE
    for height in (0, 20, 25):
        with pytest.raises(ValueError, match="multiples of 8"):
            policy.latent_shape(Size(height, 48))
    with pytest.raises(ValueError, match="num_inference_steps=1000"):
        policy.sigmas(1000, SHAPE)  # steps_offset 1 would ask for timestep 1000
    with pytest.raises(ValueError, match="expected a LoRA"):
        policy.save_lora(tmp_path / "lora")
    pipeline = ddim_pipeline(tiny_sd15_pipeline)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="clip_sample=True"):
        SD15Model(pipeline)
    trailing = tiny_sd15(tmp_path / "trailing", timestep_spacing="trailing", set_alpha_to_one=True)
    policy = load_policy(str(trailing), trainable="none")
    assert policy.sigmas(4, SHAPE).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="num_inference_steps=3"):
        policy.sigmas(3, SHAPE)  # 999, 666, 332: DDIMScheduler steps by 333 and so leaves its own timesteps
