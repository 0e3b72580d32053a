"""What a network is asked with: encoded records, a row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers import Held, send


@dataclass(frozen=True, eq=False)
class Conditions:
    """Encoded records: tensors [P, ...] with one row per record, by name.

    Rows have one shape: a family whose embeddings differ in length pads them in `Model.encode` and says the lengths in a
    tensor of its own. negative: what guidance starts from, one row per record too; None if it was not encoded.
    row [P]: the row of each record in the tensors, where this process encoded only some; None: they have all."""

    tensors: dict[str, Tensor]
    negative: Conditions | None = None
    row: Tensor | None = None
    _indices: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.row is None else len(self.row)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without those of `negative`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return next(iter(self.tensors.values())).device

    def _sent(self, index: Tensor) -> Tensor:
        """`index` beside the tensors; sent once, since a rollout asks for the same rows step by step."""
        key = index.numpy().tobytes()
        if key not in self._indices:
            (self._indices[key],) = send(self.device, index)
        return self._indices[key]

    def _here(self, index: Tensor) -> Tensor:
        """Where the rows `index` [n] lie in the tensors, all on the host."""
        if self.row is None:
            return index
        if bool((self.row[index] < 0).any()):
            raise ValueError(
                f"got rows {index[self.row[index] < 0][:8].tolist()}, which another process encoded; expected those of this one, and "
                "of the states that it trains: deal them by UpdateEngine.deal"
            )
        return self.row[index]

    @property
    def _places(self) -> Tensor:
        """Where each row lies; of one that is on another process beyond all of them, where a device refuses to look."""
        assert self.row is not None
        return torch.where(self.row < 0, len(next(iter(self.tensors.values()))), self.row)

    def rows(self, index: Tensor) -> Conditions:
        """The rows `index` [n], in that order, repeats allowed. ValueError for one that is on another process."""
        place = index
        if index.device != self.device:
            place = self._sent(self._here(index.cpu()))
        elif self.row is not None:
            place = self._here(index) if index.device.type == "cpu" else self._sent(self._places)[index]
        tensors = {name: tensor[place] for name, tensor in self.tensors.items()}
        return Conditions(tensors, None if self.negative is None else self.negative.rows(index))

    def each(self, change: Callable[[Held], Held]) -> Conditions:
        """With every tensor, those of `negative` among them, changed in the same way."""
        row = torch.arange(len(self)) if self.row is None else self.row
        changed = {name: change(Held(row, tensor)) for name, tensor in self.tensors.items()}
        negative = None if self.negative is None else self.negative.each(change)
        tensors = {name: rows.values for name, rows in changed.items()}
        return Conditions(tensors, negative, next(iter(changed.values())).row)

    def to(self, device: str | torch.device) -> Conditions:
        """The same on `device`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Conditions(tensors, None if self.negative is None else self.negative.to(device), self.row)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """All rows of all parts; ValueError if some have negatives and others have none, or their rows differ in shape."""
        shapes = [{name: list(tensor.shape[1:]) for name, tensor in part.tensors.items()} for part in parts]
        if different := [found for found in shapes if found != shapes[0]]:
            raise ValueError(
                f"got conditions of the shapes {shapes[0]} and {different[0]}; expected one shape: give all prompts equally many "
                "source images of one aspect ratio"
            )
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        negatives = [part.negative for part in parts if part.negative is not None]
        if negatives and len(negatives) < len(parts):
            raise ValueError(
                f"got {len(parts)} conditions, {len(negatives)} of them with negative rows; expected all or none: encode "
                "them with the same `negative`"
            )
        rows, held = [], 0
        for part in parts:
            row = torch.arange(len(part)) if part.row is None else part.row
            rows.append(torch.where(row >= 0, row + held, row))
            held += len(next(iter(part.tensors.values())))
        row_of_all = None if all(part.row is None for part in parts) else torch.cat(rows)
        return Conditions(tensors, Conditions.cat(negatives) if negatives else None, row_of_all)
