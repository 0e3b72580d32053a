"""Encoded prompts, kept by text, so that each distinct one goes through the encoders once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flowalign.models.base import Conditions


class PromptStore:
    """Encoded prompts by text. Not bounded: it holds every distinct text of the run, on the encoders' device."""

    def __init__(self, encode: Callable[[list[str]], Conditions]) -> None:
        self._encode = encode
        self._rows: dict[str, Conditions] = {}

    @property
    def encoded(self) -> int:
        """How many distinct texts went through the encoders."""
        return len(self._rows)

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._rows]
        if new:
            encoded = self._encode(new)
            self._rows |= {text: encoded.rows(torch.tensor([row])) for row, text in enumerate(new)}
        return Conditions.cat([self._rows[text] for text in prompts])
