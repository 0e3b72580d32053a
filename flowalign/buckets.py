"""Sizes of what is generated, and which prompts an iteration uses: prompts of several sizes lie in buckets, a bucket for each size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from flowalign.data import PromptRecord
from flowalign.media import Size
from flowalign.prompt_files import short
from samplers.noise import generator


def bucketed(records: Sequence[PromptRecord], sizes: Sequence[Size], usual: Size) -> list[PromptRecord]:
    """The records with the one of `sizes` in which each is trained.

    It has the aspect ratio nearest to (by the ratio of the two) that of the metadata "height" and "width", or of the first source image,
    or else of `usual`; and as many frames as the metadata "frames", or else `usual`, says. Of several as near it is the one nearest in area,
    but for an image, of which the number of pixels says nothing, the first. ValueError for metadata that are no numbers of pixels or frames, a number of frames that no
    size has, and an image that cannot be read."""
    return [replace(record, size=_nearest(record, sizes, usual)) for record in records]


def _nearest(record: PromptRecord, sizes: Sequence[Size], usual: Size) -> Size:
    own = {key: _whole(record, key) for key in ("height", "width", "frames") if key in record.metadata}
    if ("height" in own) != ("width" in own):
        raise ValueError(f"got the prompt {record.prompt!r} with {own}; expected both height and width, or neither")
    frames = own.get("frames", usual.frames)
    if not (fitting := [size for size in sizes if size.frames == frames]):
        raise ValueError(
            f"got the prompt {record.prompt!r} for {frames} frames; expected one of {sorted({size.frames for size in sizes})}, those "
            "of rollout.buckets: add a bucket, or leave the prompt out"
        )
    if "height" in own:
        height, width = own["height"], own["width"]
    elif record.images:
        height, width = record.images[0].sides()
    else:
        height, width = usual.height, usual.width
    by_area = "height" in own or not record.images

    def distance(size: Size) -> tuple[float, float]:
        ratio = abs(math.log(size.height * width / (size.width * height)))
        return ratio, abs(math.log(size.height * size.width / (height * width))) if by_area else 0.0

    return min(fitting, key=distance)


def _whole(record: PromptRecord, key: str) -> int:
    given: Any = record.metadata[key]
    text = str(given)  # cells of a table are texts
    if isinstance(given, bool) or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"got the prompt {record.prompt!r} with {key}={short(given)}; expected a whole number from 1")
    return int(text)


def bucket_counts(records: Sequence[PromptRecord]) -> dict[Size | None, int]:
    """Prompts per size, in the order in which sizes first come."""
    return {size: len(rows) for size, rows in _buckets(records).items()}


def prompts_of_iteration(records: Sequence[PromptRecord], count: int, seed: int, iteration: int) -> list[PromptRecord]:
    """The `count` prompts of an iteration (0 is the first), all of one bucket. A function of (seed, iteration) alone, so a resumed run
    needs no data position.

    A bucket is read in an order that is shuffled for each of its epochs, and an iteration may span two of them: what is left of an epoch
    begins an iteration, and the next epoch fills it. So each epoch has each prompt once, and in a bucket of fewer than `count` prompts
    some come twice in an iteration. Buckets take turns in proportion to their prompts, evenly spread."""
    buckets = _buckets(records)
    chosen = list(buckets.values())
    turns = tuple(len(rows) // math.gcd(*map(len, chosen)) for rows in chosen)
    order, earlier = _turns(turns)
    period, place = divmod(iteration, len(order))
    bucket = int(order[place])
    return _of_bucket(chosen[bucket], count, seed, period * turns[bucket] + int(earlier[place]))


def _buckets(records: Sequence[PromptRecord]) -> dict[Size | None, list[PromptRecord]]:
    found: dict[Size | None, list[PromptRecord]] = {}
    for record in records:
        found.setdefault(record.size, []).append(record)
    return found


def _of_bucket(records: Sequence[PromptRecord], count: int, seed: int, turn: int) -> list[PromptRecord]:
    """The prompts of the bucket's `turn`-th iteration."""
    chosen = []
    for position in range(turn * count, (turn + 1) * count):
        epoch, place = divmod(position, len(records))
        order = generator(seed, "data", epoch).permutation(len(records))
        chosen.append(records[int(order[place])])
    return chosen


@lru_cache(maxsize=4)
def _turns(turns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which bucket each iteration of a period has, bucket b `turns[b]` times, and how often that bucket came before in the period."""
    time = np.concatenate([(np.arange(own) + 0.5) / own for own in turns])
    bucket = np.repeat(np.arange(len(turns)), turns)
    earlier = np.concatenate([np.arange(own) for own in turns])
    order = np.lexsort((bucket, time))
    return bucket[order], earlier[order]
