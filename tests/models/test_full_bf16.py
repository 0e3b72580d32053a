"""Full weights in fp32 whose network multiplies in bf16: what runs, what stays fp32, and a run from the first update to its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.data import as_records, load_prompts
from flowalign.models import Policy, Size, load_policy
from flowalign.models.load import read_pipeline
from flowalign.models.roles import Role
from flowalign.run.load import load_run
from flowalign.run.places import find_places
from flowalign.storage.metrics_log import read_rows
from tests.helpers import two_networks
from tests.helpers.multiplications import Multiplications
from tests.helpers.tiny_run import run_it

FULL: dict[str, Any] = {"trainable": "full", "dtype": "bf16"}
BF16 = [
    "policy.trainable=full",
    "policy.dtype=bf16",
    "policy.reference_copy=true",
    "trainer.objective.init_args.clip_range=0.1",
]
OTHER_SHAPES = ["rollout.micro_batch=6", "trainer.micro_batch=1"]  # in which bf16 may round otherwise


def velocity(policy: Policy, role: str = "policy", scale: float = 1.0) -> Tensor:
    shape = policy.latent_shape(Size(24, 48))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    conditions = policy.encode(as_records(['the word "KITE" in red on a white background', ""]), negative=scale > 1)
    with policy.role(role):
        return policy.velocity(x, torch.tensor([0.95, 0.4]), conditions, guidance_scale=scale)


def gradients(policy: Policy, role: str = "policy") -> dict[str, Tensor]:
    named = policy.parameters_of(role)
    found = torch.autograd.grad(velocity(policy, role).square().mean(), [p for _, p in named])
    return {name: grad for (name, _), grad in zip(named, found, strict=True)}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_products_are_bf16_and_all_else_is_fp32(tiny_pipeline: Path, tiny_sd15_pipeline: Path, family: str) -> None:
    path = str({"sd3": tiny_pipeline, "sd15": tiny_sd15_pipeline}[family])
    policy, exact = load_policy(path, reference_copy=True, **FULL), load_policy(path, trainable="full")
    policy.add_roles({"old": Role("copy"), "fake": Role("trained")})
    assert {p.dtype for network in policy.networks() for p in network.parameters()} == {torch.float32}
    for role in ("policy", "fake"):
        with Multiplications() as counted:
            found = gradients(policy, role)
        assert set(counted.dtypes) == {torch.bfloat16}
        assert all(grad.dtype == torch.float32 for grad in found.values())
    with torch.no_grad(), Multiplications() as counted:
        v = velocity(policy, scale=2.0)
        assert all(torch.equal(velocity(policy, role, 2.0), v) for role in ("reference", "old", "fake"))
    assert set(counted.dtypes) == {torch.bfloat16}
    assert v.dtype == torch.float32
    assert 0 < relative(v, velocity(exact, scale=2.0)) < 0.02
    ours, theirs = (torch.cat([g.flatten() for g in gradients(p).values()]) for p in (policy, exact))
    assert relative(ours, theirs) < 0.05
    with Multiplications() as counted:
        gradients(exact)
    assert set(counted.dtypes) == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_two_networks_and_a_role_from_another_pipeline(tmp_path: Path) -> None:
    path = str(two_networks.save_pipeline(tmp_path / "pipeline"))
    prompts = load_prompts(str(two_networks.save_prompts(tmp_path)))[:2]
    policy = load_policy(path, family="tests.helpers.two_networks.FAMILY", vae_dtype="fp32", **FULL)
    for encoder in policy.model.encoders:
        encoder.float()  # this family casts nothing
    policy.add_roles({"real": Role(init=path)})
    x = torch.randn(2, *policy.latent_shape(Size(24, 48)))
    conditions = policy.encode(prompts)
    with Multiplications() as counted:
        v = policy.velocity(x, torch.tensor([0.95, 0.4]), conditions)
        v.square().mean().backward()
        with policy.role("real"):
            assert torch.equal(policy.velocity(x, torch.tensor([0.95, 0.4]), conditions), v)
    assert set(counted.dtypes) == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in policy.trainable_parameters())


def test_recomputed_activations_are_bf16_too(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), **FULL)
    plain = gradients(policy)
    with policy.checkpointed(), Multiplications() as counted:
        again = gradients(policy)
    assert set(counted.dtypes) == {torch.bfloat16}
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())


def test_a_changed_weight_is_cast_anew(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), **FULL)
    before = velocity(policy)
    for _, parameter in policy.trainable_parameters():
        parameter.data *= 1.1
    assert relative(velocity(policy), before) > 0.05


def test_a_run_moves_every_weight_and_keeps_them_in_fp32(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Its replay drifts by rounding alone; checkpoint, average and export are fp32; the policy and its base that are read
    from it multiply as it did."""
    run_it(tiny_pipeline, tmp_path, "run.iterations=2", "run.ema_decay=0.5", *BF16, *OTHER_SHAPES)
    folder = tmp_path / "tiny"
    rows = read_rows(folder / "metrics.jsonl")
    assert all(0 <= row["ratio/drift_max"] < 5e-3 for row in rows) and rows[-1]["optim/grad_norm"] > 0
    begin = load_policy(str(tiny_pipeline), trainable="full")
    policy = load_run(folder, ema=False)
    pairs = list(zip(begin.trainable_parameters(), policy.trainable_parameters(), strict=True))
    assert all(own.dtype == torch.float32 and not torch.equal(own, old) for (_, old), (_, own) in pairs)
    [exported] = (folder / "networks").glob("transformer/*.safetensors")
    for file in (exported, *folder.glob("checkpoints/step-2/*.safetensors")):
        dtypes = {key: tensor.dtype for key, tensor in load_file(file).items()}
        assert not [key for key, dtype in dtypes.items() if dtype in (torch.bfloat16, torch.float16)]
    base = find_places({"base": "base", "run": str(folder)})["base"].load(None, "cpu")
    for found in (policy, base):
        with torch.no_grad(), Multiplications() as counted:
            velocity(found)
        assert set(counted.dtypes) == {torch.bfloat16}
    assert torch.equal(velocity(base), velocity(load_policy(str(tiny_pipeline), **FULL)))


def test_a_live_pipeline_in_bf16_is_refused(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match=r"transformer in bfloat16; expected fp32 .* dtype='bf16'"):
        load_policy(read_pipeline(str(tiny_pipeline), dtype="bf16"), trainable="full")
    with pytest.raises(ValueError, match="got dtype with a live pipeline"):
        load_policy(read_pipeline(str(tiny_pipeline)), **FULL)
