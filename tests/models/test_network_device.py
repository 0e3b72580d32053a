"""Where a network computes is asked of diffusers, which walks over all modules, once, and again after the network has moved."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin

from flowalign.data import as_records
from flowalign.models import LoRA, Size, load_policy
from flowalign.models.load import read_pipeline
from flowalign.models.roles import Role

CPU, META = (
    torch.device("cpu"),
    torch.device("meta"),
)  # meta stands for a GPU: it says where tensors are, and holds none


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_a_velocity_walks_over_no_modules(
    tiny_pipeline: Path, tiny_sd15_pipeline: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str({"sd3": tiny_pipeline, "sd15": tiny_sd15_pipeline}[family]), lora=LoRA(rank=4))
    policy.add_roles({"old": Role("copy")})
    x = torch.randn(2, *policy.latent_shape(Size(24, 48)))
    conditions = policy.encode(as_records(["a", "b"]), negative=True)
    walks: Counter[str] = Counter()
    for name in ("device", "dtype"):
        own = vars(ModelMixin)[name]

        def counted(network: ModelMixin, own: property = own, name: str = name) -> object:
            walks[name] += 1
            return own.fget(network)

        monkeypatch.setattr(ModelMixin, name, property(counted))
    policy.velocity(x, torch.tensor([0.9, 0.4]), conditions)
    first = walks.copy()
    for role in ("policy", "old", "reference"):
        with policy.role(role):
            policy.velocity(policy.start(x), torch.tensor([0.9, 0.4]), conditions, guidance_scale=2.0)
    assert first == {"device": 1} and walks == first


def test_the_device_is_that_of_the_network_when_it_has_moved(tiny_pipeline: Path) -> None:
    pipe = read_pipeline(str(tiny_pipeline))
    policy, noise = load_policy(pipe, trainable="none"), torch.zeros(1, 3, 24, 48)
    assert policy.start(noise).device == CPU
    pipe.transformer.to(META)
    assert policy.start(noise).device == META
    pipe.transformer.to_empty(device=CPU)
    assert policy.start(noise).device == CPU


def test_a_network_that_is_loaded_elsewhere_and_moved_later(tiny_pipeline: Path) -> None:
    """As under FSDP2, which takes it to the device block by block."""
    policy = load_policy(str(tiny_pipeline), network_device=META, device=CPU)
    assert policy.start(torch.zeros(1)).device == META
    [network] = policy.modules().values()
    network.to_empty(device=CPU)
    assert policy.start(torch.zeros(1)).device == CPU


def test_a_network_under_group_offloading_computes_where_its_groups_go(tiny_pipeline: Path) -> None:
    pipe = read_pipeline(str(tiny_pipeline))
    pipe.transformer.to(META)
    pipe.transformer.enable_group_offload(CPU, META, offload_type="leaf_level")
    policy = load_policy(pipe, trainable="none")
    assert next(pipe.transformer.parameters()).device == META
    assert policy.start(torch.zeros(1)).device == CPU
