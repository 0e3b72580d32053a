"""A user's family of two networks, with source images and its own guidance, trains, replays and resumes like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.data import load_prompts
from flowalign.models import LoRA, Policy, Role, Size, check_lora_targets, inspect_checkpoint, load_policy
from flowalign.run.run import Run
from flowalign.storage.metrics_log import read_rows
from samplers import Chain
from tests.helpers.tiny_run import result, run_it
from tests.helpers.two_networks import BOUNDARY, save_pipeline, save_prompts

FAMILY = "tests.helpers.two_networks.FAMILY"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("edit") / "pipeline")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prompts(tmp_path_factory.mktemp("edits"))


def overrides(prompts: Path) -> list[str]:
    return [
        f"policy.family={FAMILY}", f"prompts={prompts}", f"evaluation.prompts={prompts}",
        "evaluation.allow_training_prompts=true", "policy.lora.targets=null",
        "policy.roles={old: {update: copy}, slow: {update: ema, of: old}}", "rollout.guidance_scale=2",
        "rollout.allow_cfg_update=true", "rollout.plan={class_path: samplers.Chain}", "run.ema_decay=0.5",
        "evaluation.guidance_scale=2", "evaluation.count=2",
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_it_trains_replays_and_resumes_bit_for_bit(
    folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_it(folder, tmp_path / "whole", *overrides(prompts))
    assert 0 <= summary["ratio_drift_max"] <= 1e-6  # I1
    rows = read_rows(tmp_path / "whole" / "tiny" / "metrics.jsonl")
    forecast = 2 * Chain().forecast(3, 3).rollout / 3  # two rows per state
    assert [row["cost/rollout_per_image"] for row in rows] == pytest.approx([forecast] * 3)
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    whole = result(tmp_path / "whole")
    lora = LoRA(rank=4, alpha=8)
    start = dict(load_policy(str(folder), lora=lora, family=FAMILY, seed=0).trainable_parameters())
    assert {name.split(".")[0] for name in start} == {"transformer", "transformer_2"}
    assert len(start) == 2 * len(check_lora_targets(str(folder), None, FAMILY)) == 16
    assert not [name for name, value in start.items() if torch.equal(whole[0][f"role_policy/{name}"], value)]

    calls, backward = [], Run.backward

    def dies(run: Run, loss: Any, update: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        backward(run, loss, update)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Run, "backward", dies)
        run_it(folder, tmp_path / "killed", *overrides(prompts))
    run_it(folder, tmp_path / "killed", *overrides(prompts))
    killed = result(tmp_path / "killed")
    assert killed[1:] == whole[1:] and killed[0].keys() == whole[0].keys()
    assert all(torch.equal(killed[0][name], value) for name, value in whole[0].items())
    # what the run exports is what it trained, network by network
    again = load_policy(str(folder), lora=str(tmp_path / "whole" / "tiny" / "lora"), family=FAMILY)
    for name, value in again.trainable_parameters():
        assert torch.equal(value, whole[0][f"ema/{name}"])
    assert (tmp_path / "whole" / "tiny" / "lora" / "transformer_2" / "adapter_config.json").is_file()


def velocity(policy: Policy, prompts: Path, sigma: float, guidance_scale: float = 1.0, row: int = 0) -> torch.Tensor:
    conditions = policy.encode(load_prompts(str(prompts))[row : row + 1], negative=True)
    x = torch.randn(1, *policy.latent_shape(Size(24, 48)), generator=torch.Generator().manual_seed(0))
    return policy.velocity(x, torch.tensor([sigma]), conditions, guidance_scale=guidance_scale)


def test_sigma_chooses_the_network_and_every_call_counts(folder: Path, prompts: Path) -> None:
    policy = load_policy(str(folder), trainable="full", family=FAMILY)
    for sigma, used in ((BOUNDARY, "transformer"), (BOUNDARY - 0.01, "transformer_2")):
        velocity(policy, prompts, sigma, 2.0).square().mean().backward()
        moved = {name.split(".")[0] for name, p in policy.trainable_parameters() if p.grad is not None}
        assert moved == {used}
        for _, parameter in policy.trainable_parameters():
            parameter.grad = None
    assert policy.evaluations == 4 and policy.rows_per_state(2.0) == 2


@torch.no_grad()
def test_images_and_negative_prompts_reach_the_velocity(folder: Path, prompts: Path) -> None:
    policy = load_policy(str(folder), trainable="none", family=FAMILY)
    records = load_prompts(str(prompts))
    own, other = (policy.encode([record]).tensors for record in records[:2])
    assert not torch.equal(own["source"], other["source"])
    negative = policy.encode(records[:2], negative=True).negative
    assert negative is not None and torch.equal(negative.tensors["source"][0], own["source"][0])
    assert torch.equal(negative.tensors["embeds"][0], negative.tensors["embeds"][1])
    plain, guided = (velocity(policy, prompts, 0.5, scale) for scale in (1.0, 3.0))
    assert not torch.allclose(plain, guided, atol=1e-3)
    torch.testing.assert_close(guided.norm(), plain.norm())  # the family's rule, not ours


@torch.no_grad()
def test_roles_switch_every_network(folder: Path, prompts: Path) -> None:
    policy = load_policy(str(folder), lora=LoRA(rank=2, alpha=4), family=FAMILY)
    policy.add_roles({"old": Role()})
    before = [velocity(policy, prompts, sigma) for sigma in (0.95, 0.2)]
    for name, parameter in policy.trainable_parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    for sigma, base in zip((0.95, 0.2), before, strict=True):
        assert not torch.equal(velocity(policy, prompts, sigma), base)
        for role in ("old", "reference"):
            with policy.role(role):
                assert torch.equal(velocity(policy, prompts, sigma), base)
    names = [name for role in ("policy", "old") for name, _ in policy.parameters_of(role)]
    assert len(set(names)) == len(names)


def test_a_family_that_cannot_be_used_is_refused_before_loading(
    folder: Path, prompts: Path, tiny_pipeline: Path
) -> None:
    for pipeline, family, message in (
        (folder, None, "a EditPipeline; expected one of .*StableDiffusion3Pipeline"),
        (tiny_pipeline, FAMILY, "expected a EditPipeline"),
        (folder, "tests.helpers.two_networks.FAMILIES", "cannot be imported"),
        (folder, "no_such_module.FAMILY", "cannot be imported"),
        (folder, "tests.helpers.two_networks.BOUNDARY", "a float; expected a flowalign.models.Family"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_checkpoint(str(pipeline), family)
