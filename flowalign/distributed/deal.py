"""Which process trains which states: equally many on each, and where they were rolled out as far as that goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Deal:
    """n items, each on one process. rows: of each process, its items, ascending; all processes know them all. rank: which one this
    is. repeated: what each process repeats where it has no item, [1] or none; None: the first item of another one."""

    rank: int
    rows: tuple[Tensor, ...]
    repeated: tuple[Tensor, ...] | None = None

    @staticmethod
    def of(owner: Tensor, rank: int, count: int) -> Deal:
        """Of items that lie on the processes `owner` [n]: each process gets equally many, but for one at most. It keeps its own,
        the first ones if it has too many; what is left over fills the others up."""
        own = [(owner == each).nonzero().flatten() for each in range(count)]
        least, more = divmod(len(owner), count)
        quota = dict.fromkeys(range(count), least)
        for each in sorted(range(count), key=lambda each: -len(own[each]))[:more]:
            quota[each] += 1
        left = torch.cat([items[quota[each] :] for each, items in enumerate(own)])
        rows, begin = [], 0
        for each, items in enumerate(own):
            end = begin + max(0, quota[each] - len(items))
            rows.append(torch.cat([items[: quota[each]], left[begin:end]]).sort().values)
            begin = end
        return Deal(rank, tuple(rows))

    def __len__(self) -> int:
        """n."""
        return sum(len(items) for items in self.rows)

    @property
    def mine(self) -> Tensor:
        """The items of this process."""
        return self.rows[self.rank]

    @cached_property
    def padded(self) -> tuple[Tensor, ...]:
        """Of each process as many items as the one with most has: its own, and then the first of them again. A process without
        any has `repeated`."""
        longest = max(len(items) for items in self.rows)
        some = next((items for items in self.rows if len(items)), self.rows[0])
        other = self.repeated or (some,) * len(self.rows)
        firsts = [(items if len(items) else spare)[:1] for items, spare in zip(self.rows, other, strict=True)]
        return tuple(
            torch.cat([items, first.expand(longest - len(items))]) if len(first) else items
            for items, first in zip(self.rows, firsts, strict=True)
        )

    def only(self, items: Tensor) -> Deal:
        """Of these items alone, each where it is. A process that is left without any repeats one of this deal: it has no other."""
        repeated = tuple(padded[:1] for padded in self.padded)
        return Deal(self.rank, tuple(own[torch.isin(own, items)] for own in self.rows), repeated)

    def wanted(self, of_item: Tensor) -> list[Tensor]:
        """What each process needs for its items, each once, ascending: `of_item` [n] names it for each item."""
        return [of_item[items].unique() for items in self.padded]


def union(*wanted: Sequence[Tensor]) -> list[Tensor]:
    """For each process all that any of the lists names for it, each once, ascending."""
    return [torch.cat(each).unique() for each in zip(*wanted, strict=True)]
