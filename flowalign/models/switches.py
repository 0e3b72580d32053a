"""Switches of the networks for speed and memory; what they compute changes by rounding at most."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, attention_backend
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from flowalign.errors import RunError

GRADIENTS = 4  # no graph; or one that comes to a block through none of its inputs, through its states, or through all
BATCHES = 3  # the first one, one of a single row, one of any other number


@dataclass(frozen=True)
class Switches:
    """gradient_checkpointing: blocks store no activations, their backward computes them again. compile: each repeated block is
    compiled. attention: the name of one of diffusers' back-ends, such as "flash"; None: the network's own."""

    gradient_checkpointing: bool = False
    compile: bool = False
    attention: str | None = None

    def check(self, networks: Mapping[str, ModelMixin]) -> None:
        """ValueError for what a network, which may be on the meta device, or this machine cannot do."""
        for name, network in networks.items():
            what = f"{type(network).__name__} ({name})"
            if self.gradient_checkpointing and not network._supports_gradient_checkpointing:
                raise ValueError(
                    f"got policy.gradient_checkpointing=true for a {what}, which diffusers cannot checkpoint; expected false"
                )
            if self.compile and not repeated_blocks(network):
                raise ValueError(
                    f"got policy.compile=true for a {what}, of which diffusers names no repeated blocks; expected false"
                )
            if self.attention is not None:
                _check_attention(self.attention, network, what)
        if self.compile and torch.__version__ < "2.14":
            raise ValueError(
                f"got policy.compile=true with torch {torch.__version__}, whose limit of graphs cannot be set for a network; expected "
                "torch 2.14 or later: update it, or set policy.compile=false"
            )

    def set(self, networks: Iterable[ModelMixin], roles: int, recomputed: Callable[..., Any]) -> None:
        """Sets them; may be repeated, for more roles. roles: how many each network is called under. recomputed: see
        ModelMixin.enable_gradient_checkpointing."""
        for network in networks:
            # checkpointing that a live pipeline came with would recompute under another role
            if self.gradient_checkpointing or network.is_gradient_checkpointing:
                network.enable_gradient_checkpointing(recomputed)
            if self.attention is not None:
                # the back-end is also made that of all models of the process: leaving the context undoes this
                with attention_backend(AttentionBackendName.NATIVE):
                    network.set_attention_backend(self.attention)
            if self.compile:
                compile_blocks(network, roles)


# ------------------------------------------------------------------------------------------ compile


def repeated_blocks(network: ModelMixin) -> list[nn.Module]:
    """The blocks of which a network has many: those that diffusers names so, or where it names none (SD3) those that it never
    splits over devices."""
    names = network._repeated_blocks or network._no_split_modules or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def graph_limit(network: ModelMixin, roles: int) -> int:
    """How many graphs a network may need: one for each kind of block, role, way of its gradients and size of batch. Blocks are
    of one kind, and share graphs, if their layers have the same names, classes and shapes."""
    kinds = {
        (
            *((name, type(module)) for name, module in block.named_modules()),
            *((name, parameter.shape) for name, parameter in block.named_parameters()),
        )
        for block in repeated_blocks(network)
    }
    return len(kinds) * roles * GRADIENTS * BATCHES


def compile_blocks(network: ModelMixin, roles: int, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each repeated block, without graph breaks: one, or more graphs than `graph_limit`, is an error at the call, where
    torch would go on uncompiled else. backend: see torch.compile."""
    limit = graph_limit(network, roles)
    for block in repeated_blocks(network):
        block.compile(fullgraph=True, backend=backend, recompile_limit=limit)


@contextmanager
def graphs_counted() -> Iterator[None]:
    """A context in which torch's error of too many graphs is a RunError that says what to do."""
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise RunError(
            "got more graphs of the network's blocks than one for each kind of block, role, way of gradients and size of batch; "
            "expected their inputs to have one shape: set rollout.fixed_rows=true, or policy.compile=false (TORCH_LOGS=recompiles "
            f"says what made the last graph): {error}"
        ) from error


# ------------------------------------------------------------------------------------------ attention


def _check_attention(name: str, network: ModelMixin, what: str) -> None:
    known = [each.value for each in AttentionBackendName]
    if name not in known:
        raise ValueError(
            f"got policy.attention={name!r}; expected one of {', '.join(known)}; nearest: {difflib.get_close_matches(name, known, n=2)}"
        )
    if "sage" in name:
        raise ValueError(
            f"got policy.attention={name!r}, which has no backward; expected one that trains, such as native or flash"
        )
    layers = [part for part in network.modules() if isinstance(part, (Attention, AttentionModuleMixin))]
    own = [type(layer.processor).__name__ for layer in layers if not _dispatches(layer.processor)]
    if own and name != AttentionBackendName.NATIVE.value:
        raise ValueError(
            f"got policy.attention={name!r} for a {what}, whose {own[0]} calls torch's own attention and no other; expected "
            "native or null"
        )
    try:
        with attention_backend(name):
            pass
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise ValueError(f"got policy.attention={name!r}, which this machine cannot use: {error}") from error


def _dispatches(processor: Any) -> bool:
    """Whether a processor of diffusers asks for the back-end that is set; those that do have this attribute."""
    return hasattr(processor, "_attention_backend")
