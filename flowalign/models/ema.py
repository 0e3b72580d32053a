"""EMA: an exponential moving average of the trained parameters, for evaluation and for saving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from flowalign.storage.named_tensors import check_same_names
from flowalign.storage.sharded import sharded_as


@dataclass
class EMA:
    """shadow ← decay·shadow + (1 − decay)·parameter, once per optimizer step; decay in [0, 1).

    Shadows are fp32 whatever the parameters' dtype. Costs one more fp32 copy of the trained parameters, two inside
    `applied`. Never touches `requires_grad`, gradients or the optimizer."""

    named: InitVar[Iterable[tuple[str, Parameter]]]
    decay: float = 0.9
    _parameters: dict[str, Parameter] = field(init=False, repr=False)
    _shadows: dict[str, Tensor] = field(init=False, repr=False)
    _applied: bool = field(default=False, init=False, repr=False)

    def __post_init__(self, named: Iterable[tuple[str, Parameter]]) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"got EMA decay {self.decay}; expected 0 <= decay < 1, such as 0.9 or 0.999")
        self._parameters = dict(named)
        self._shadows = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the shadows; call it after each optimizer step."""
        if self._applied:
            raise RuntimeError(
                "got EMA.update inside EMA.applied, which would average the average: leave the context first"
            )
        for name, parameter in self._parameters.items():
            self._shadows[name].lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards, also after an exception, exactly their own values again.

        The swap is in place, so a graph built before it cannot be differentiated after it (torch says so)."""
        if self._applied:
            raise RuntimeError("got EMA.applied inside EMA.applied; expected it once: it cannot be nested")
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._applied = True
        try:
            self._write(self._shadows)
            yield
        finally:
            self._write(own)
            self._applied = False

    def tensors(self) -> dict[str, Tensor]:
        """The shadows by parameter name, for a checkpoint."""
        return dict(self._shadows)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies what `tensors()` gave for a checkpoint into the shadows. CheckpointError naming parameters that differ."""
        check_same_names("EMA", self._shadows, tensors)
        for name, shadow in self._shadows.items():
            shadow.copy_(sharded_as(shadow, tensors[name]))

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
