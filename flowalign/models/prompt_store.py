"""Encoded records, kept on the CPU, so that a text that comes again need not go through the encoders again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from flowalign.data import PromptRecord
from flowalign.models.base import Size
from flowalign.models.conditions import Conditions

Key = tuple[object, ...]


class PromptStore:
    """The most recently used encoded records, at most `limit` bytes of them.

    encode: one row for one record, for a size of what is generated, as a prompt or as a negative one. In a batch the rounding of an embedding depends on the other texts; so each record is
    encoded alone, and one that was dropped and is encoded again gets equal bits. Records of equal prompt, images, size and kind are one."""

    def __init__(self, encode: Callable[[PromptRecord, Size | None, bool], Conditions], limit: int) -> None:
        self._encode = encode
        self._limit = limit
        self._rows: OrderedDict[Key, Conditions] = OrderedDict()
        self._bytes = 0
        self.encoded = 0

    def missing(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> list[PromptRecord]:
        """The distinct records that `conditions` would encode."""
        keys = {_key(record, size, negative): record for record in records}
        new = {key: record for key, record in keys.items() if key not in self._rows}
        return list(new.values())

    def conditions(self, records: Sequence[PromptRecord], size: Size | None, negative: bool) -> Conditions:
        """One row per record, on the CPU. `encoded` counts what went through the encoders."""
        found: dict[Key, Conditions] = {}
        for record in records:
            key = _key(record, size, negative)
            if key in self._rows:
                self._rows.move_to_end(key)
                found[key] = self._rows[key]
            elif key not in found:
                found[key] = self._add(key, self._encode(record, size, negative).to("cpu"))
        return Conditions.cat([found[_key(record, size, negative)] for record in records])

    def _add(self, key: Key, row: Conditions) -> Conditions:
        self.encoded += 1
        self._rows[key] = row
        self._bytes += row.nbytes
        while self._bytes > self._limit:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= oldest.nbytes
        return row


def _key(record: PromptRecord, size: Size | None, negative: bool) -> Key:
    return (size, negative, record.prompt, *record.images)
