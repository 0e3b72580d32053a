"""What every model family shares beside training: LoRA files to and from plain diffusers, kept prompts, bf16, switches of speed and memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch._dynamo.utils import counters

from flowalign.models import load_policy, switches
from flowalign.models.checks import rows_per_state
from flowalign.models.conditions import Conditions
from flowalign.models.grid import pipeline_call, pipeline_latents
from flowalign.models.load import read_pipeline
from flowalign.models.load_call import load_call
from flowalign.models.lora import matched_modules
from flowalign.models.sampling import sample
from flowalign.models.switches import compile_blocks, repeated_blocks
from tests.helpers.families import Subject, parity
from tests.helpers.family_run import SMALL, gradient, sampling_of, shaken, velocity

pytestmark = pytest.mark.slow
Note = Callable[..., None]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_lora_makes_the_same_latents_in_plain_diffusers(family: Subject, note: Note, tmp_path: Path) -> None:
    """Loaded by the lines that the report gives to the user; alpha is not the rank."""
    sampling, policy = sampling_of(family), shaken(family.policy(lora=SMALL))
    policy.save_lora(tmp_path / "lora")
    records = family.records(family.together)
    noise = torch.randn(len(records), *policy.latent_shape(family.size), generator=torch.Generator().manual_seed(0))
    call = load_call(family.folder, None, "fp32", None)
    lines = [f"pipe = {call}", *pipeline_call(policy, sampling)[0]]
    names: dict[str, Any] = {"torch": torch, "DiffusionPipeline": diffusers.DiffusionPipeline}
    exec("\n".join(lines), names)
    names["pipe"].set_progress_bar_config(disable=True)
    with torch.no_grad():
        base = pipeline_latents(names["pipe"], policy, records, noise, sampling)
        exec("\n".join(family.family.load_lora(repr(str(tmp_path / "lora")))), names)
        theirs = pipeline_latents(names["pipe"], policy, records, noise, sampling)
    negative = policy.rows_per_state(sampling.guidance_scale) > 1
    conditions = policy.encode(records, negative=negative, together=True, size=family.size)
    ours = sample(policy, conditions, noise, sampling.num_inference_steps, sampling.guidance_scale)
    note("LoRA in plain diffusers", parity(family, ours, theirs))
    assert relative(base, theirs) > 1e-3


def test_a_policy_starts_from_a_lora_that_diffusers_wrote(family: Subject, note: Note, tmp_path: Path) -> None:
    """Its velocity is that of the pipeline with diffusers' own adapter."""
    pipeline: Any = read_pipeline(family.folder)
    layers = {}
    for name in family.family.networks:
        network = pipeline.components[name]
        modules = matched_modules(network, family.family.targets)
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules), "theirs")
        generator = torch.Generator().manual_seed(1)
        for key, parameter in network.named_parameters():
            if ".lora_" in key:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        layers[name] = get_peft_model_state_dict(network, adapter_name="theirs")
    if len(layers) == 1:
        pipeline.save_lora_weights(tmp_path, **{f"{name}_lora_layers": part for name, part in layers.items()})
    else:  # save_lora_weights takes one network's
        both = {f"{name}.{key}": tensor for name, part in layers.items() for key, tensor in part.items()}
        pipeline.write_lora_layers(both, tmp_path, True, None, None, True)
    policy = family.policy(lora=str(tmp_path))
    with torch.no_grad():
        ours = velocity(family, policy)
        theirs = velocity(family, load_policy(pipeline, trainable="none", negative_prompt=policy.negative_prompt))
        with policy.role("reference"):
            base = velocity(family, policy)
    assert relative(ours, theirs) <= 1e-6 and relative(base, theirs) > 1e-3
    note("warm start", relative(ours, theirs))


def test_kept_prompts_are_those_encoded_anew(family: Subject, note: Note) -> None:
    sampling = sampling_of(family)
    negative = rows_per_state(family.folder, sampling.guidance_scale) > 1
    keeping, anew = (family.policy(trainable="none", sampling=sampling, **store) for store in ({}, {"prompt_store": 0}))
    records = family.records(2)
    first, *others = (everything(policy.encode(records, negative=negative)) for policy in (keeping, keeping, anew))
    negatives = (2 if family.family.source_images[0] else 1) * negative  # of equal prompts without images one
    assert keeping.encoded == 2 + negatives  # the second time none
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)
    note("kept prompts")


def everything(conditions: Conditions) -> dict[str, Tensor]:
    """Its tensors, those of its negative rows too."""
    negative = {} if conditions.negative is None else everything(conditions.negative)
    return {**conditions.tensors, **{f"negative.{name}": tensor for name, tensor in negative.items()}}


def test_a_base_in_bf16(family: Subject, note: Note) -> None:
    """The adapters and the velocity stay fp32."""
    exact, rounded = (shaken(family.policy(lora=SMALL, dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert {network.dtype for network in rounded.modules().values()} == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in rounded.trainable_parameters()} == {torch.float32}
    with torch.no_grad():
        ours, theirs = (velocity(family, policy, 1.0) for policy in (rounded, exact))
    assert ours.dtype == torch.float32 and bool(ours.isfinite().all())
    assert 0 < relative(ours, theirs) < 0.05
    assert all(bool(found.isfinite().all()) for found in gradient(family, rounded, 1.0).values())
    note("bf16", float(f"{relative(ours, theirs):.0e}"))


def test_recomputed_activations_give_the_plain_gradient(family: Subject, note: Note) -> None:
    plain, again = (
        gradient(family, shaken(family.policy(lora=SMALL, gradient_checkpointing=on))) for on in (False, True)
    )
    assert sum(bool(found.any()) for found in plain.values()) > len(plain) / 2
    note("gradient checkpointing", max(float((again[name] - plain[name]).abs().max()) for name in plain))
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
def test_repeated_blocks_compile_without_a_break(family: Subject, note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for inductor, then run as they are: the same bits."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(switches, "compile_blocks", partial(compile_blocks, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (gradient(family, shaken(family.policy(lora=SMALL, compile=on))) for on in (False, True))
    torch._dynamo.reset()
    assert graphs and all(torch.equal(compiled[name], plain[name]) for name in plain)
    note("compile: breaks", sum(counters["graph_break"].values()))
    assert not counters["graph_break"]
    assert all(repeated_blocks(network) for network in family.policy(trainable="none").modules().values())


def test_offloaded_parts_give_the_same_bits(family: Subject, note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one device, as a machine without an accelerator has it; each part is sent there and back."""
    sampling, sent = sampling_of(family), set[str]()
    plain = family.policy(trainable="none", sampling=sampling)
    away: Any = family.policy(trainable="none", sampling=sampling, offload=["encoders", "vae"])
    for name, part in (
        ("vae", away.model.vae),
        *((f"encoder {n}", part) for n, part in enumerate(away.model.encoders)),
    ):
        monkeypatch.setattr(part, "to", lambda device, name=name: sent.add(f"{name} {device}"))
    latents = torch.randn(1, *plain.latent_shape(family.size), generator=torch.Generator().manual_seed(0))
    (rows, images), (others, same) = (
        (policy.encode(family.records(2)).tensors, policy.decode(latents)) for policy in (plain, away)
    )
    assert all(torch.equal(rows[name], others[name]) for name in rows) and torch.equal(images, same)
    assert len(sent) == 1 + len(away.model.encoders)
    note("offload")
