"""EMA: an exponential moving average of the trained parameters, for evaluation and for saving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from flowalign.named_state import check_same_names


@dataclass
class EMA:
    """shadow ← d·shadow + (1 − d)·parameter, on every `every`-th call of `update` (one call per optimiser step).

    d = `decay` in [0, 1); with `warmup`, d = min(decay, (1 + n) / (10 + n)) after n optimiser steps, so that a young
    average is not held at the initial weights. Defaults of flow_grpo: decay 0.9, every 8 (grpo_family §2.10). Shadows
    are fp32 whatever the parameters' type. Costs one more fp32 copy of the trained parameters, two inside `applied`.
    Never touches `requires_grad`, gradients or the optimiser."""

    named: InitVar[Iterable[tuple[str, Parameter]]]
    decay: float = 0.9
    every: int = 1
    warmup: bool = False
    steps: int = field(default=0, init=False)  # optimiser steps seen
    _parameters: dict[str, Parameter] = field(init=False, repr=False)
    _shadows: dict[str, Tensor] = field(init=False, repr=False)
    _applied: bool = field(default=False, init=False, repr=False)

    def __post_init__(self, named: Iterable[tuple[str, Parameter]]) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA decay {self.decay}: expected 0 <= decay < 1, such as 0.9 or 0.999")
        if self.every < 1:
            raise ValueError(f"EMA every {self.every}: expected a number of optimiser steps, at least 1")
        self._parameters = dict(named)
        self._shadows = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Counts one optimiser step, and moves the shadows when it is the `every`-th."""
        if self._applied:
            raise RuntimeError("EMA.update inside EMA.applied would average the average: leave the context first")
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        for name, parameter in self._parameters.items():
            self._shadows[name].lerp_(parameter.float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; after it, also after an exception, their own bits again.

        The swap is in place, so a graph built before it cannot be differentiated after it (torch says so)."""
        if self._applied:
            raise RuntimeError("EMA.applied is already active: it cannot be nested")
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._applied = True
        try:
            self._write(self._shadows)
            yield
        finally:
            self._write(own)
            self._applied = False

    def tensors(self) -> dict[str, Tensor]:
        """The shadows by parameter name, for a checkpoint; `steps` goes beside them as JSON."""
        return dict(self._shadows)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Takes up `tensors()` and `steps` of a checkpoint. Raises CheckpointError naming parameters that differ."""
        check_same_names("EMA", self._shadows, tensors)
        for name, shadow in self._shadows.items():
            shadow.copy_(tensors[name])
        self.steps = steps

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
