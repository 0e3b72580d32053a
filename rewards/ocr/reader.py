"""Recognizers: the contract of what reads text in images for the OCR reward, and RapidOCR in a pool of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewards.workers import Message, Workers

LINE_PICTURE = 64  # pictures up to this height are taken for one line of text


@dataclass(frozen=True, eq=False)
class Line:
    """One line of text. box: four corners (x, y), or None for a whole picture. posterior: the CTC probabilities
    [frames, 1 + len(alphabet)] with the blank first, or None from a recognizer that has none."""

    text: str
    confidence: float
    box: list[list[float]] | None = None
    posterior: np.ndarray | None = None


class Recognizer(Protocol):
    """Reads pictures. Lines come in reading order."""

    def read(self, images: np.ndarray, alphabet: str) -> list[list[Line]]:
        """images: uint8 RGB [N, H, W, 3]; alphabet: the characters whose posterior is wanted. One list per picture."""
        ...

    def load(self) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class RapidReader:
    """RapidOCR with the models of its wheel (PP-OCRv6 small in rapidocr 3.10.0): no network.

    detect: find lines first; False: the picture is one line (for small renders, about 200 times faster); None: lines
    are searched in pictures higher than 64 pixels. workers: processes with one thread each; None: the CPU cores of this
    machine shared among its local ranks, at most 16; 0: in this process (for debugging). batch_size: line pictures per
    engine call. timeout: seconds without an answer from any worker after which they are killed with a TimeoutError.
    """

    detect: bool | None = None
    workers: int | None = None
    batch_size: int = 8
    timeout: float = 60.0
    _pool: Workers | None = field(default=None, init=False, repr=False)
    _engine: Any = field(default=None, init=False, repr=False)

    def load(self) -> None:
        """Starts the workers and builds their engines (about 2 s)."""
        self._answers([])

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = self._engine = None

    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [] if self._pool is None else self._pool.pids()

    def read(self, images: np.ndarray, alphabet: str) -> list[list[Line]]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise TypeError(f"got images {images.dtype} {list(images.shape)}; expected uint8 RGB [N, H, W, 3]")
        detect = images.shape[1] > LINE_PICTURE if self.detect is None else self.detect
        header = {"detect": detect, "alphabet": alphabet}
        share = -(-len(images) // max(1, self.count()))  # a small batch is spread over all workers
        size = 1 if detect else max(1, min(self.batch_size, share))
        answers = self._answers([(header, images[i : i + size]) for i in range(0, len(images), size)])
        return [page for answer in answers for page in _pages(answer)]

    def count(self) -> int:
        """Number of worker processes."""
        if self.workers is not None:
            return self.workers
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return max(1, min(16, cores // ranks))

    def _answers(self, jobs: Sequence[Message]) -> list[Message]:
        from rewards.ocr import rapid

        if self.count() == 0:
            self._engine = self._engine or rapid.Engine()
            return [self._engine(*job) for job in jobs]
        self._pool = self._pool or Workers(Path(rapid.__file__), {}, self.count(), self.timeout)
        return self._pool.map(jobs)


def _pages(answer: Message) -> list[list[Line]]:
    header, posteriors = answer
    pages: list[list[Line]] = []
    start = 0
    for page in header["lines"]:
        pages.append([])
        for line in page:
            end = start + line["frames"]
            pages[-1].append(Line(line["text"], line["confidence"], line["box"], posteriors[start:end]))
            start = end
    return pages
