"""A base in 8 or 4 bits: what diffusers is asked for, what is refused, and, where bitsandbytes is installed, that it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

from flowalign.build import policy_of
from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import LoRA, Size, load_policy, quantization
from flowalign.models.load import read_pipeline
from flowalign.models.load_call import load_call
from flowalign.models.lora import lora_layers
from flowalign.models.roles import Role
from flowalign.run.places import find_places
from tests.helpers.multiplications import Multiplications
from tests.helpers.tiny_run import run_it

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
QUANTIZERS = {"8bit": BnB8BitDiffusersQuantizer, "4bit": BnB4BitDiffusersQuantizer}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes is found, in a version that diffusers takes, and so is a GPU."""
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.50.2")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_diffusers_is_asked_to_quantize_the_networks_alone(
    tiny_pipeline: Path, bits: str, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None
) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(path: str, **arguments: Any) -> None:
        asked.update(arguments)
        raise OSError(0, "stop here")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="stop here"):
        load_policy(str(tiny_pipeline), dtype="bf16", quantization=bits, device="cuda")
    [(name, config)] = asked["quantization_config"].quant_mapping.items()
    assert name == "transformer"
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "8bit", bits == "4bit")
    if bits == "4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_what_is_refused_before_a_weight_is_read(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None
) -> None:
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    path = str(tiny_pipeline)
    with pytest.raises(ValueError, match=r"4bit with policy.trainable=full.*: set policy.trainable=lora"):
        load_policy(path, trainable="full", quantization="4bit", device="cuda")
    with pytest.raises(ValueError, match="4bit without a CUDA device"):
        load_policy(path, quantization="4bit")
    full = ["policy.trainable=full", "trainer.regularizers={}"]
    with pytest.raises(ConfigError, match=r"8bit with policy\.trainable=full"):
        load_config(CONFIG, [f"policy.path={path}", "policy.quantization=8bit", *full])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, _ = load_config(CONFIG, [f"policy.path={path}", "policy.quantization=8bit"])  # a forecast needs no GPU
    with pytest.raises(ConfigError, match="8bit without a CUDA device"):
        policy_of(config, "cpu")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flowalign-diffusion\[quantization\]'"):
        load_config(CONFIG, [f"policy.path={path}", "policy.quantization=8bit"])
    with pytest.raises(ConfigError, match="quantization"):
        load_config(CONFIG, [f"policy.path={path}", "policy.quantization=2bit"])


def test_a_live_pipeline_is_not_quantized(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="got quantization with a live pipeline"):
        load_policy(read_pipeline(str(tiny_pipeline)), quantization="4bit")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_call_of_a_report_quantizes_alike(tiny_pipeline: Path) -> None:
    names: dict[str, Any] = {"torch": torch}
    exec("from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig", names)

    class Asked:
        def from_pretrained(self, path: str, **arguments: Any) -> dict[str, Any]:
            return arguments

    call = load_call(str(tiny_pipeline), None, "bf16", None, "4bit")
    asked = eval(call, names | {"DiffusionPipeline": Asked()})["quantization_config"].quant_mapping
    ours = quantization.quantization_config("4bit", ["transformer"], torch.bfloat16).quant_mapping
    assert {name: config.to_dict() for name, config in asked.items()} == {
        name: config.to_dict() for name, config in ours.items()
    }


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_on_a_quantized_base_have_gradients(
    tiny_pipeline: Path, tmp_path: Path, bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bitsandbytes itself, on the CPU, where diffusers would refuse it."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # its packing for inference wants layers 64 wide
    monkeypatch.setattr(QUANTIZERS[bits], "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(QUANTIZERS[bits], "update_device_map", lambda self, places: {"": "cpu"})
    monkeypatch.setattr("flowalign.models.load.check_quantization", lambda *_: None)
    exact, policy = (
        load_policy(str(tiny_pipeline), lora=LoRA(rank=4, alpha=6), dtype="bf16", quantization=chosen)
        for chosen in (None, bits)
    )
    [network] = policy.modules().values()
    layers = lora_layers(network)
    assert layers and all(not layer.get_base_layer().weight.is_floating_point() for layer in layers)
    x = torch.randn(2, *policy.latent_shape(Size(24, 48)), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (exact, policy):
        for _, parameter in each.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        conditions = each.encode(as_records(["a", "b"]))
        with Multiplications() as counted:
            v = each.velocity(x, torch.tensor([0.9, 0.4]), conditions)
            v.square().mean().backward()
        grads = [parameter.grad for _, parameter in each.trainable_parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        found.append((v.detach(), torch.cat([grad.flatten() for grad in grads])))
    assert torch.float32 not in counted.dtypes
    limits = {"8bit": (0.05, 0.05), "4bit": (0.3, 0.6)}[bits]  # of rounding in 32-wide layers
    for ours, theirs, limit in zip(found[1], found[0], limits, strict=True):
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < limit
    policy.save_lora(tmp_path / "lora")
    policy.add_roles({"teacher": Role(init=str(tmp_path / "lora"))})  # exported and read again, it is the policy
    with torch.no_grad(), policy.role("teacher"):
        assert torch.equal(policy.velocity(x, torch.tensor([0.9, 0.4]), conditions), found[1][0])


def test_the_base_of_a_quantized_run_is_quantized_too(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is a pipeline beside it; their images are kept apart from those of other weights."""
    run_it(tiny_pipeline, tmp_path, "run.iterations=1", "evaluation.count=1")
    texts = {"base": "base", "run": str(tmp_path / "tiny"), "other": str(tiny_pipeline)}
    plain = find_places(texts)
    config = tmp_path / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("quantization: null", "quantization: 4bit"))
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("flowalign.run.places.load_policy", lambda path, **arguments: asked.append(arguments))
    places = find_places(texts)
    for name in ("base", "other"):
        places[name].load(None, "cuda")
        assert plain[name].weights != places[name].weights
    assert [arguments["quantization"] for arguments in asked] == ["4bit", "4bit"]
    assert places["run"].policy.quantization == "4bit"
