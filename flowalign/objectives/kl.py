"""Penalties that keep the policy near a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samplers import Step


@dataclass(frozen=True)
class KLPenalty:
    """beta · KL(policy ‖ reference) of the transition, in one of the forms of grpo_family §1.6.

    "exact_times_h" (Δμ²/2g², which forgets the step length) reproduces Flow-GRPO's betas (.04 GenEval and OCR, .01
    PickScore); "exact" is the Gaussian KL; "velocity" and "mean_sq" are the bare squared differences. Reduced over
    elements as the kernel's log-prob is."""

    beta: float = 0.0
    form: Literal["exact", "exact_times_h", "velocity", "mean_sq"] = "exact_times_h"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"kl.beta={self.beta}: expected 0 (off) or a positive weight")

    def __call__(self, step: Step, reference: Step) -> Tensor:
        return step.kl(reference, form=self.form)
