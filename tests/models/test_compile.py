"""policy.compile: each repeated block in full graphs, adapters and roles included; too many graphs are an error."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from flowalign.data import as_records
from flowalign.errors import RunError
from flowalign.models import LoRA, load_policy, switches
from flowalign.models.roles import Role
from flowalign.models.switches import Switches, compile_blocks, graph_limit, repeated_blocks
from flowalign.objectives import KLPenalty
from samplers import Window
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates

# torch hides this warning of its own tracing, but not from pytest, which makes it an error
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
LORA = LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that policies compile inside, run as torch would without compiling."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(switches, "compile_blocks", partial(compile_blocks, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()


def loss_of(policy: Any, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 24, 48, generator=generator)
    return policy.velocity(x, torch.full((count,), 0.6), policy.encode(as_records(["KITE"] * count))).square().mean()


def gradient_of(policy: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [parameter for _, parameter in policy.trainable_parameters()]))


def test_an_iteration_on_glyphs_needs_a_graph_per_kind_of_block_role_and_grad_mode(
    graphs: list[torch.fx.GraphModule],
) -> None:
    """Of five blocks, the last one without a way back into the prompt. A rollout, a KL to the reference, an update."""
    found = {}
    for compiled in (False, True):
        policy, trainer = make(
            Path("glyphs"), Window(size=1, low=0, high=2), group_size=2, steps=2, fixed_rows=4,
            regularizers={"kl": KLPenalty(0.1)}, load={"compile": compiled},
        )  # fmt: skip
        run_updates(trainer, trainer.collect(PROMPTS, 0))
        found[compiled] = gradients(policy)
        assert len(graphs) == (7 if compiled else 0)
    run_updates(trainer, trainer.collect(PROMPTS, 1))
    kinds, roles, grad_modes = 2, 2, 2
    assert len(graphs) <= kinds * roles * grad_modes and not counters["graph_break"]
    [network] = policy.networks()
    assert (
        len(graphs) == 7 and len(repeated_blocks(network)) == 5 and graph_limit(network, roles) == kinds * roles * 4 * 3
    )
    assert sum(float(gradient.norm()) > 0 for gradient in found[False].values()) > 20
    assert all(torch.equal(found[True][name], gradient) for name, gradient in found[False].items())


@pytest.mark.slow
def test_batches_of_any_size_stay_within_the_limit(tiny_pipeline: Path, graphs: list[torch.fx.GraphModule]) -> None:
    policy: Any = load_policy(str(tiny_pipeline), lora=LORA, compile=True)
    for count in (3, 5, 1, 7):
        gradient_of(policy, loss_of(policy, count))
        with policy.role("reference"), torch.no_grad():
            loss_of(policy, count)
    [network] = policy.networks()
    assert 4 < len(graphs) <= graph_limit(network, 2) / 2


def test_too_many_graphs_are_an_error(tiny_pipeline: Path, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself would go on without compiling."""
    monkeypatch.setattr(switches, "graph_limit", lambda network, roles: 3)
    policy: Any = load_policy(str(tiny_pipeline), lora=LORA, compile=True)
    with torch.no_grad():
        loss_of(policy)
    with pytest.raises(RunError, match=r"more graphs .* rollout\.fixed_rows=true, or policy\.compile=false"):
        loss_of(policy)
    assert len(graphs) == 3


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_compiled_blocks_are_recomputed_under_the_role_of_the_forward(
    tiny_pipeline: Path, graphs: list[torch.fx.GraphModule], trainable: Any
) -> None:
    found = {}
    for compiled in (False, True):
        policy: Any = load_policy(
            str(tiny_pipeline), lora=LORA if trainable == "lora" else None, trainable=trainable, reference_copy=trainable == "full",
            compile=compiled, gradient_checkpointing=compiled,
        )  # fmt: skip
        policy.add_roles({"fake": Role(update="trained")})
        generator = torch.Generator().manual_seed(2)
        fake = [parameter for _, parameter in policy.parameters_of("fake")]
        for parameter in fake:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        with policy.role("fake"):
            loss = loss_of(policy)
        with policy.role("reference"):
            found[compiled] = torch.autograd.grad(loss, fake)
    assert graphs and sum(float(gradient.norm()) > 0 for gradient in found[True]) > 10
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))


@pytest.mark.slow
def test_the_transformer_blocks_of_a_unet_are_compiled(
    tiny_sd15_pipeline: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    losses = []
    for compiled in (False, True):
        policy: Any = load_policy(str(tiny_sd15_pipeline), lora=LoRA(rank=2, alpha=2), compile=compiled)
        x, rows = (
            torch.randn(2, 4, 12, 24, generator=torch.Generator().manual_seed(0)),
            policy.encode(as_records(["a", "b"])),
        )
        losses.append(policy.velocity(x, torch.full((2,), 0.5), rows))
    [network] = policy.networks()
    assert {type(block).__name__ for block in repeated_blocks(network)} == {"BasicTransformerBlock"}
    assert 0 < len(graphs) <= graph_limit(network, 2) and torch.equal(*losses)


class Unblocked(torch.nn.Module):
    _repeated_blocks = ()
    _no_split_modules = None


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = Unblocked()
    with pytest.raises(ValueError, match=r"policy\.compile=true for a Unblocked \(transformer\)"):
        Switches(compile=True).check({"transformer": network})
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.13.0"))
    with pytest.raises(ValueError, match=r"torch 2\.13\.0"):
        load_policy("glyphs", compile=True)


@pytest.mark.slow
def test_the_default_backend_gives_the_same_to_rounding(tiny_pipeline: Path) -> None:
    torch._dynamo.reset()
    plain: Any = load_policy(str(tiny_pipeline), lora=LORA)
    compiled: Any = load_policy(str(tiny_pipeline), lora=LORA, compile=True, gradient_checkpointing=True)
    expected, found = (gradient_of(policy, loss_of(policy)) for policy in (plain, compiled))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-7)
