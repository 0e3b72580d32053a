"""The SD1.5 policy against diffusers' own pipeline under DDIM, and a DDPO-style run on it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from flowalign import models
from flowalign.cli import train as cli_train
from flowalign.config import ConfigError, load_config
from flowalign.metrics import read_rows
from flowalign.models import LoRA, Policy, check_lora_targets, load_policy, path_of
from flowalign.models.sd15 import SD15Policy
from samplers import DDIM, ODE, Forest, KeyedNoise, RectifiedFlow, VariancePreserving, chain, rollout
from tests.tiny import tiny_sd15

PROMPTS = ['the word "KITE" in red on a yellow background', "a word", "the word"]
SHAPE = (4, 12, 24)
CONFIG = str(Path(__file__).parents[1] / "data" / "tiny_sd15.yaml")
LORA = LoRA(rank=4, alpha=6)


def noise_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def ddim_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def deterministic(policy: Policy, kernel: Any, noise: Tensor, steps: int, guidance: float) -> Tensor:
    one, conditions = chain(steps, len(noise)), policy.encode(PROMPTS)
    tree = replace(one, level=torch.zeros_like(one.level))
    forest = rollout(
        lambda x, sigma, root: policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance),
        policy.start(noise), policy.sigmas(steps), tree, kernel, lambda tree, nodes: pytest.fail("asked for noise"),
    )  # fmt: skip
    return forest.at(tree.leaves)


def stochastic(policy: Policy, steps: int = 4, guidance: float = 5.0) -> tuple[Forest, Any]:
    tree, conditions = chain(steps, 3, train_last=True), policy.encode(PROMPTS)

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance)

    noise = KeyedNoise(0, 0, [0], SHAPE)
    start = policy.start(noise.start(tree))
    return rollout(velocity, start, policy.sigmas(steps), tree, DDIM().on(policy.path), noise.step), velocity


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# ------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("changed", [{}, {"prediction_type": "v_prediction"}, {"set_alpha_to_one": True}], ids=str)
def test_the_deterministic_rollout_is_the_pipeline_under_ddim(changed: dict[str, Any], tmp_path: Path) -> None:
    """Bound: ‖ours - theirs‖ ≤ 1e-6 ‖theirs‖ per call, fp32; the operations differ in order (v in place of ε and x̂0)."""
    folder = tiny_sd15(tmp_path, **changed)
    policy, pipeline = load_policy(str(folder), trainable="none"), ddim_pipeline(folder)
    embeds = policy.encode(PROMPTS).tensors["embeds"]
    negative = policy.encode([""]).rows(torch.zeros(3, dtype=torch.int64)).tensors["embeds"]
    # the text encoder rounds by batch size: the pipeline encodes "" three times at once, we once
    for mine, other in zip((embeds, negative), pipeline.encode_prompt(PROMPTS, "cpu", 1, True), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    for steps, guidance in ((1, 1.0), (4, 1.0), (4, 5.0), (7, 5.0), (20, 1.0), (20, 5.0)):
        call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "latents": noise_of(3), "height": 24,
                "width": 48, "num_inference_steps": steps, "guidance_scale": guidance}  # fmt: skip
        theirs = pipeline(**call, output_type="latent").images
        for kernel in (ODE().on(policy.path), DDIM().on(policy.path)):  # level 0 is DDIM with η = 0
            ours = deterministic(policy, kernel, noise_of(3), steps, guidance)
            assert relative(ours, theirs) <= 1e-6, (steps, guidance)
    pipeline.vae.requires_grad_(False)  # as the policy's is: torch picks its convolutions by requires_grad, also in no_grad
    images = torch.from_numpy(pipeline(**call, output_type="np").images).permute(0, 3, 1, 2)
    assert torch.equal(policy.decode(theirs), images)


def test_the_stochastic_step_is_the_schedulers(tiny_sd15_pipeline: Path) -> None:
    policy, pipeline = load_policy(str(tiny_sd15_pipeline), trainable="none"), ddim_pipeline(tiny_sd15_pipeline)
    scheduler, sigmas, conditions = pipeline.scheduler, policy.sigmas(5), policy.encode(PROMPTS)
    scheduler.set_timesteps(5)
    for step, timestep in enumerate(scheduler.timesteps):
        x, z = noise_of(3, step), noise_of(3, 100 + step)
        with torch.no_grad():
            eps = pipeline.unet(x, timestep, conditions.tensors["embeds"]).sample
            v = policy.velocity(x, sigmas[step].expand(3), conditions)
        theirs = scheduler.step(eps, timestep, x, eta=0.8, variance_noise=z).prev_sample
        ours = DDIM(eta=0.8).on(policy.path)(x, v, sigmas[step], sigmas[step + 1])
        assert relative(ours.sample(z), theirs) <= 1e-6
        assert float(ours.std[0]) > 0.01  # also in the last step, which ends at timestep 0
    torch.testing.assert_close(policy.path.noise_from_velocity(x, v, sigmas[step].expand(3)), eps, rtol=0, atol=1e-5)


def test_ddim_golden_values() -> None:
    """grpo_family §1.9: ᾱ = .5, ᾱ' = .8, η = .6, x = .3, ε = .4 or v = .25, in float64."""
    path = VariancePreserving(torch.tensor([0.8, 0.5], dtype=torch.float64))
    x, eps, end = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.3, 0.4, 0.5))
    for v, mean, log_prob in (
        (path.velocity_from_noise(x, eps, 1.0), 0.17454223, -0.44031922),
        (torch.full_like(x, 0.25), 0.18022459, -0.40637061),
    ):
        step = DDIM(eta=0.6).on(path)(x, v, 1.0, 0.5)
        assert float(step.mean) == pytest.approx(mean, abs=1e-8)
        assert float(step.std) == pytest.approx(0.23237900, abs=1e-8)
        assert float(step.log_prob(end)) == pytest.approx(log_prob, abs=1e-7)


@pytest.mark.parametrize("steps", [3, 4, 50, 999])
def test_the_levels_are_the_released_schedulers_timesteps(steps: int, tiny_sd15_pipeline: Path) -> None:
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    released = PNDMScheduler.from_pretrained(tiny_sd15_pipeline, subfolder="scheduler")
    released.set_timesteps(steps)
    expected = released.timesteps.unique().flip(0)  # PNDM evaluates the second one twice
    assert torch.equal((policy.sigmas(steps)[:-1] * 1000).round().long() - 1, expected)
    assert policy.sigmas(steps).dtype == torch.float32 and float(policy.sigmas(steps)[-1]) == pytest.approx(0.001)


def test_guidance_is_one_call_of_both_halves_and_counts_two(
    tiny_sd15_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    conditions, x, sigma = policy.encode(PROMPTS), noise_of(3), torch.full((3,), 0.502)
    batches: list[int] = []
    policy.modules()["unet"].register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    policy.velocity(x, sigma, conditions)
    policy.velocity(x, sigma, conditions, guidance_scale=5.0)
    assert batches == [3, 6] and policy.evaluations == 9
    deterministic(policy, ODE().on(policy.path), x, 4, 5.0)
    assert policy.evaluations == 9 + 3 * 4 * 2
    assert policy.encoded == len(PROMPTS) + 1  # each text once, the negative one included


# ------------------------------------------------------------------------------------------ training


def tuned_policy(folder: Path, **settings: Any) -> Policy:
    """A policy whose adapters do something (B starts at 0)."""
    policy = load_policy(str(folder), lora=LORA, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_replay_has_ratio_1_on_every_stored_edge(tiny_sd15_pipeline: Path) -> None:
    policy = tuned_policy(tiny_sd15_pipeline)
    forest, velocity = stochastic(policy)
    edges = forest.tree.edges
    assert len(edges) == 3 * 4 and bool(forest.log_prob[edges].isfinite().all())

    def drift() -> float:
        parents, position = forest.tree.distinct_parents(edges)
        v = velocity(forest.at(parents), forest.sigma(parents), forest.tree.root[parents])
        new = forest.edge_steps(edges, v, position).log_prob(forest.at(edges))
        return float((new - forest.log_prob[edges]).detach().abs().max())

    assert drift() <= 1e-6
    for _, parameter in policy.trainable_parameters():
        parameter.data *= 1.1
    assert drift() > 1e-5  # the measure sees a changed policy


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_role_pass_between_forward_and_backward_keeps_the_gradients(
    checkpointing: bool, tiny_sd15_pipeline: Path
) -> None:
    policy = tuned_policy(tiny_sd15_pipeline)
    if checkpointing:
        policy.modules()["unet"].enable_gradient_checkpointing()
        policy.modules()["unet"].train()  # diffusers checkpoints in training mode only; the model has no dropout
    conditions, x, sigma = policy.encode(PROMPTS), noise_of(3), torch.tensor([0.902, 0.502, 0.102])

    def gradients(between: bool) -> list[Tensor]:
        loss = policy.velocity(x, sigma, conditions, guidance_scale=3.0).square().mean()
        if between:
            with torch.no_grad(), policy.role("reference"):
                assert not torch.allclose(
                    policy.velocity(x, sigma, conditions, guidance_scale=3.0).square().mean(), loss
                )
        return list(torch.autograd.grad(loss, [p for _, p in policy.trainable_parameters()]))

    plain, interrupted = gradients(between=False), gradients(between=True)
    assert len(plain) == 64 and all(float(g.norm()) > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, interrupted, strict=True))
    assert all(p.requires_grad for _, p in policy.trainable_parameters())


def test_the_reference_is_the_model_as_released(tiny_sd15_pipeline: Path) -> None:
    policy, released = tuned_policy(tiny_sd15_pipeline), load_policy(str(tiny_sd15_pipeline), trainable="none")
    conditions, x, sigma = policy.encode(PROMPTS), noise_of(3), torch.full((3,), 0.502)
    with policy.role("reference"):
        assert torch.equal(policy.velocity(x, sigma, conditions), released.velocity(x, sigma, conditions))
    assert not torch.allclose(policy.velocity(x, sigma, conditions), released.velocity(x, sigma, conditions), atol=1e-3)


def test_full_weights_and_bf16(tiny_sd15_pipeline: Path) -> None:
    conditions, x, sigma = None, noise_of(3), torch.full((3,), 0.502)
    outputs = []
    for settings in ({"trainable": "full", "reference_copy": True}, {"dtype": "bf16", "lora": LORA}):
        policy = load_policy(str(tiny_sd15_pipeline), **settings)
        conditions = policy.encode(PROMPTS)
        assert {p.dtype for _, p in policy.trainable_parameters()} == {torch.float32}
        outputs.append(policy.velocity(x, sigma, conditions))
        outputs[-1].square().mean().backward()
        assert sum(float(p.grad.norm()) for _, p in policy.trainable_parameters() if p.grad is not None) > 0
        with policy.role("reference"), torch.no_grad():
            torch.testing.assert_close(policy.velocity(x, sigma, conditions), outputs[-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.1, atol=0.05)


def test_the_lora_loads_in_plain_diffusers(tiny_sd15_pipeline: Path, tmp_path: Path) -> None:
    """alpha 6 at rank 4; the process that loads it never imports flowalign."""
    policy = tuned_policy(tiny_sd15_pipeline)
    policy.save_lora(tmp_path)
    ours = deterministic(policy, ODE().on(policy.path), noise_of(3), 4, 5.0)
    torch.save(noise_of(3), tmp_path / "noise.pt")  # this test's own files
    setup = "\n".join(policy.pipeline_setup())
    script = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tiny_sd15_pipeline)!r})
{setup}
call = dict(prompt={PROMPTS!r}, latents=torch.load({str(tmp_path / "noise.pt")!r}), num_inference_steps=4,
            guidance_scale=5.0, height=24, width=48, output_type="latent")
base = pipe(**call).images
pipe.load_lora_weights({str(tmp_path)!r})
torch.save((base, pipe(**call).images), {str(tmp_path / "latents.pt")!r})
assert "flowalign" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, cwd=tmp_path)
    base, theirs = torch.load(tmp_path / "latents.pt")
    assert relative(base, ours) > 1e-2  # the adapter does something
    assert relative(theirs, ours) <= 2e-6  # the prompts were encoded in other batches


@pytest.fixture(scope="module")
def ddpo_run(tiny_sd15_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ddpo")
    assert cli_train([CONFIG, f"policy.path={tiny_sd15_pipeline}", f"run.output={output}"]) == 0
    return output / "tiny"


def test_a_ddpo_style_run_through_the_command_line(ddpo_run: Path, tiny_sd15_pipeline: Path) -> None:
    rows = read_rows(ddpo_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["optim/grad_norm"] > 0 and row["ratio/drift_max"] <= 1e-6
        assert row["cost/rollout_per_image"] == 4 * 2 and row["group/trained_edges"] == 2 * 3 * 4
        assert row["cost/update_per_image"] == 2 * (4 * 2) + 4 * 2  # backward counts 1 with LoRA; reference once
    assert rows[1]["loss/kl"] > 0  # the policy has left the reference
    from flowalign import checkpoint

    start = dict(load_policy(str(tiny_sd15_pipeline), lora=LORA, seed=0).trainable_parameters())
    tensors, _ = checkpoint.load(checkpoint.latest(ddpo_run))
    moved = [not torch.equal(tensors["parameters"][name], value) for name, value in start.items()]
    assert len(moved) == 64 and all(moved)


def test_the_report_says_how_to_sample_the_run(ddpo_run: Path) -> None:
    pipeline = json.loads((ddpo_run / "summary.json").read_text())["pipeline"]
    assert pipeline["arguments"]["negative_prompt"] == ""
    assert "DDIMScheduler.from_config(pipe.scheduler.config)" in (ddpo_run / "report.html").read_text()


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
        (good, ["rollout.kernel=samplers.FlowSDE"], "FlowSDE came for a policy on VariancePreserving"),
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
        DDIM().on(RectifiedFlow())
    with pytest.raises(ValueError, match="without a path"):
        DDIM()(noise_of(1), noise_of(1), 0.5, 0.25)


def test_what_the_policy_itself_refuses(tiny_sd15_pipeline: Path, tmp_path: Path) -> None:
    assert len(check_lora_targets(str(tiny_sd15_pipeline), None)) == 32
    with pytest.raises(ValueError, match="max_sequence_length"):
        load_policy(str(tiny_sd15_pipeline), max_sequence_length=77)
    policy = load_policy(str(tiny_sd15_pipeline), trainable="none")
    assert policy.latent_shape(24, 48) == SHAPE
    for height in (0, 20, 25):
        with pytest.raises(ValueError, match="multiples of 8"):
            policy.latent_shape(height, 48)
    with pytest.raises(ValueError, match="num_inference_steps=1000"):
        policy.sigmas(1000)  # steps_offset 1 would ask for timestep 1000
    with pytest.raises(ValueError, match="no LoRA"):
        policy.save_lora(tmp_path / "lora")
    pipeline = ddim_pipeline(tiny_sd15_pipeline)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="clip_sample=True"):
        SD15Policy(pipeline)
    trailing = tiny_sd15(tmp_path / "trailing", timestep_spacing="trailing", set_alpha_to_one=True)
    policy = load_policy(str(trailing), trainable="none")
    assert policy.sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="num_inference_steps=3"):
        policy.sigmas(3)  # 999, 666, 332: DDIMScheduler steps by 333 and so leaves its own timesteps
