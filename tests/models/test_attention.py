"""policy.attention: one of diffusers' back-ends, refused before a model is loaded where it cannot be used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import load_policy
from flowalign.models.switches import Switches
from tests.helpers.tiny_run import CONFIG


def tiny_flux() -> FluxTransformer2DModel:
    """A network of diffusers that asks for the back-end that is set."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def output(network: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {"hidden_states": (1, 6, 4), "encoder_hidden_states": (1, 3, 8), "pooled_projections": (1, 8)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in inputs.items()}
    ids = {"img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        return network(**tensors, **ids, timestep=torch.tensor([0.5]), return_dict=False)[0]


def set_to(name: str, network: Any) -> None:
    switches = Switches(attention=name)
    switches.check({"transformer": network})
    switches.set([network], 2, lambda block, *inputs: block(*inputs))


def test_native_is_the_default_bit_for_bit() -> None:
    plain, network = output(tiny_flux()), tiny_flux()
    set_to("native", network)
    assert torch.equal(output(network), plain)


def test_the_network_calls_the_back_end_and_no_other_network_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """_native_math, by a function that notes its calls in its place."""
    network, other, calls = tiny_flux(), tiny_flux(), []
    plain, backends = output(other), attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(backends, name, lambda own=backends[name], **given: calls.append(1) or own(**given))
    set_to("_native_math", network)
    torch.testing.assert_close(output(network), plain)
    assert len(calls) == 2  # a block of each kind
    assert torch.equal(output(other), plain) and len(calls) == 2


def test_a_network_that_calls_torch_itself_takes_native_only(tiny_pipeline: Path, tiny_sd15_pipeline: Path) -> None:
    plain: Any = load_policy(str(tiny_pipeline), trainable="none")
    native: Any = load_policy(str(tiny_pipeline), trainable="none", attention="native")
    x, rows = torch.randn(1, 3, 24, 48), plain.encode(as_records(["KITE"]))
    with torch.no_grad():
        expected, found = (policy.velocity(x, torch.tensor([0.5]), rows) for policy in (plain, native))
    assert torch.equal(expected, found)
    for pipeline, network in ((tiny_pipeline, "SD3Transformer2DModel"), (tiny_sd15_pipeline, "UNet2DConditionModel")):
        with pytest.raises(ValueError, match=rf"'flex' for a {network} .* expected native or null"):
            load_policy(str(pipeline), attention="flex")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flahs", r"got policy\.attention='flahs'; expected one of .*nearest: \['flash'"),
        ("sage", "has no backward"),
        ("flash", r"this machine cannot use: .*install `flash-attn"),
        ("xformers", r"this machine cannot use: .*install `xformers"),
    ],
)
def test_what_cannot_be_used_is_refused_with_words(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Switches(attention=name).check({"transformer": tiny_flux()})


def test_a_configuration_with_a_wrong_name_is_refused_before_a_model_is_loaded(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowalign.models.load.read_pipeline", lambda *given, **more: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"policy\.attention='flahs'"):
        load_config(CONFIG, [f"policy.path={tiny_pipeline}", "policy.attention=flahs"])
    config, plain = load_config(CONFIG, [f"policy.path={tiny_pipeline}", "policy.attention=native"])
    assert config.policy.switches == Switches(attention="native") and plain["policy"]["attention"] == "native"
