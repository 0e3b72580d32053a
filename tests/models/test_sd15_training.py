"""Training SD1.5: replay, roles, export into plain diffusers, and a DDPO-style run through the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.cli import train as cli_train
from flowalign.data import as_records
from flowalign.models import LoRA, Policy, load_policy
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows
from samplers import DDIM, ODE, Forest, KeyedNoise, chain, rollout
from tests.helpers.sd15_calls import PROMPTS, SHAPE, deterministic, noise_of, relative

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny_sd15.yaml")
LORA = LoRA(rank=4, alpha=6)


def stochastic(policy: Policy, steps: int = 4, guidance: float = 5.0) -> tuple[Forest, Any]:
    tree, conditions = chain(steps, 3, train_last=True), policy.encode(as_records(PROMPTS), negative=True)

    def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        return policy.velocity(x, sigma, conditions.rows(root), guidance_scale=guidance)

    noise = KeyedNoise(0, 0, [0], SHAPE)
    start = policy.start(noise.start(tree))
    return rollout(velocity, start, policy.sigmas(steps, SHAPE), tree, DDIM().bind(policy.path), noise.step), velocity


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
    conditions, x, sigma = (
        policy.encode(as_records(PROMPTS), negative=True),
        noise_of(3),
        torch.tensor([0.902, 0.502, 0.102]),
    )

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
    conditions, x, sigma = policy.encode(as_records(PROMPTS), negative=True), noise_of(3), torch.full((3,), 0.502)
    with policy.role("reference"):
        assert torch.equal(policy.velocity(x, sigma, conditions), released.velocity(x, sigma, conditions))
    assert not torch.allclose(policy.velocity(x, sigma, conditions), released.velocity(x, sigma, conditions), atol=1e-3)


def test_full_weights_and_bf16(tiny_sd15_pipeline: Path) -> None:
    conditions, x, sigma = None, noise_of(3), torch.full((3,), 0.502)
    outputs = []
    for settings in ({"trainable": "full", "reference_copy": True}, {"dtype": "bf16", "lora": LORA}):
        policy = load_policy(str(tiny_sd15_pipeline), **settings)
        conditions = policy.encode(as_records(PROMPTS), negative=True)
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
    ours = deterministic(policy, ODE().bind(policy.path), noise_of(3), 4, 5.0)
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
    start = dict(load_policy(str(tiny_sd15_pipeline), lora=LORA, seed=0).trainable_parameters())
    tensors, _ = checkpoint.load(checkpoint.latest(ddpo_run))
    moved = [not torch.equal(tensors["role_policy"][name], value) for name, value in start.items()]
    assert len(moved) == 64 and all(moved)


def test_the_report_says_how_to_sample_the_run(ddpo_run: Path) -> None:
    pipeline = json.loads((ddpo_run / "summary.json").read_text())["pipeline"]
    assert pipeline["arguments"]["negative_prompt"] == ""
    assert "DDIMScheduler.from_config(pipe.scheduler.config)" in (ddpo_run / "report.html").read_text()
