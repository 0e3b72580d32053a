"""The mean of LoRAs is that of what they change; adapters are cheaper than copies of the model."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import LoRA, Policy, Role, load_policy
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.lora import ADAPTER, lora_layers, matched_modules
from flowalign.models.lora_file import read_lora
from flowalign.models.lora_merge import merge_loras

TARGETS = ("attn.to_q", "ff.net.2")


def drawn(pipeline: Path, seed: int, **settings) -> Policy:
    policy, generator = load_policy(str(pipeline), lora=LoRA(**settings)), torch.Generator().manual_seed(seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def changes(policy: Policy) -> dict[str, torch.Tensor]:
    """ΔW of each adapted layer."""
    (network,) = policy.modules().values()
    return {
        name: layer.get_delta_weight(ADAPTER).detach().double()
        for name, layer in network.named_modules()
        if layer in lora_layers(network)
    }


@pytest.fixture(scope="module")
def teachers(
    tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Two of other ranks and alphas, the second without one of the layers."""
    made = []
    for seed, settings in enumerate(
        ({"rank": 3, "alpha": 7, "targets": TARGETS}, {"rank": 2, "alpha": 2, "targets": TARGETS[:1]})
    ):
        policy, folder = drawn(tiny_pipeline, seed, **settings), tmp_path_factory.mktemp("teacher")
        policy.save_lora(folder)
        made.append((str(folder), changes(policy)))
    return made


def mean(teachers) -> dict[str, torch.Tensor]:
    (_, one), (_, two) = teachers
    return {name: (one[name] + two.get(name, torch.zeros_like(one[name]))) / 2 for name in one}


def test_with_enough_rank_the_student_starts_as_the_mean_of_what_they_change(tiny_pipeline: Path, teachers) -> None:
    for rank, alpha in ((5, 5.0), (8, 16.0)):
        lora = LoRA(rank, alpha, TARGETS, init=tuple(folder for folder, _ in teachers))
        policy = load_policy(str(tiny_pipeline), lora=lora)
        found, expected = changes(policy), mean(teachers)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    files = [read_lora(folder, "transformer") for folder, _ in teachers]
    assert merge_loras(files, 5, 5.0).error == 0
    x, sigma = torch.ones(1, 3, 24, 48), torch.tensor([0.5])
    policy.velocity(x, sigma, policy.encode(as_records("KITE"))).sum().backward()
    (network,) = policy.modules().values()
    for layer in lora_layers(network):  # also what the merge did not fill can learn
        assert bool((layer.lora_B[ADAPTER].weight.grad.abs().sum(0) > 0).all())


def test_with_less_rank_it_is_the_nearest_matrix_of_that_rank(tiny_pipeline: Path, teachers) -> None:
    files, expected = [read_lora(folder, "transformer") for folder, _ in teachers], mean(teachers)
    merged, errors = merge_loras(files, 2, 6.0), []
    for name, value in expected.items():
        a, b = (factor.double() for factor in merged.factors[name])
        u, s, v = torch.linalg.svd(value)
        torch.testing.assert_close(6.0 / 2 * b @ a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
        errors.append(float(s[2:].norm() / s.norm()))
    assert merged.error == pytest.approx(max(errors), rel=1e-4) and merged.error > 0.1


def test_the_mean_of_the_factors_is_another_matrix(teachers) -> None:
    file = read_lora(teachers[0][0], "transformer")
    tensors, name = file.tensors(), file.modules[0]
    a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
    pair = (a, b), (torch.roll(a, 1, 1), torch.roll(b, 1, 0))
    right = sum(b @ a for a, b in pair) / 2
    wrong = (sum(b for _, b in pair) / 2) @ (sum(a for a, _ in pair) / 2)
    assert float((wrong - right).norm() / right.norm()) > 0.3
    same = merge_loras([file, file], 3, 7.0)
    scale = file.alphas[name] / file.ranks[name]
    torch.testing.assert_close(
        7 / 3 * (same.factors[name][1] @ same.factors[name][0]).double(), scale * b @ a, rtol=1e-4, atol=1e-5
    )


def test_a_list_of_folders_stands_in_the_configuration(tiny_pipeline: Path, teachers) -> None:
    folders = [folder for folder, _ in teachers]
    settings = [f"policy.path={tiny_pipeline}", f"policy.lora.init={folders}"]
    config, _ = load_config("tests/data/tiny.yaml", settings)
    assert config.policy.lora.init == tuple(folders)
    with pytest.raises(ConfigError, match="leaves out"):
        load_config("tests/data/tiny.yaml", [*settings, "policy.lora.targets=[attn.to_v]"])
    with pytest.raises(ConfigError, match="at least two"):
        load_config("tests/data/tiny.yaml", [settings[0], f"policy.lora.init={folders[:1]}"])


# ------------------------------------------------------------------------------------------ memory


def bytes_of(parameters) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def sd35_medium() -> nn.Module:
    """Its transformer without weights, in bf16: 24 blocks of 24 heads of 64, of which the first 13 attend twice."""
    with torch.device("meta"):
        return SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ).to(torch.bfloat16)  # fmt: skip


def test_teachers_as_adapters_cost_a_part_of_what_models_cost() -> None:
    """The table of docs/methods.md: bytes per teacher."""
    network = sd35_medium()
    layers = [network.get_submodule(name) for name in matched_modules(network, FAMILY.targets)]
    adapter = sum(4 * 32 * sum(layer.weight.shape) for layer in layers)  # rank 32, fp32
    model = bytes_of(network.parameters())
    assert (round(model / 1e6), round(adapter / 1e6)) == (4486, 75)


def test_a_second_teacher_of_glyphs_adds_its_adapter_alone(tiny_pipeline: Path, teachers) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LoRA(3, 7, TARGETS))
    before = bytes_of(p for network in policy.networks() for p in network.parameters())
    policy.add_roles({f"teacher_{number}": Role(init=teachers[0][0]) for number in range(3)})
    after = bytes_of(p for network in policy.networks() for p in network.parameters())
    own = bytes_of(p for _, p in policy.parameters_of("policy"))
    assert after - before == 3 * own
