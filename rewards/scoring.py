"""Scores of many batches as one answer; in a thread if the reward is computed elsewhere, or the caller has other work meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Self

from rewards.answers import cat, no_answer
from rewards.base import Reward, RewardBatch, RewardOutput, channels_of
from rewards.guard import check_rate, score

AHEAD = 4  # batches that wait at most, decoded and in memory


class Scoring:
    """The answers on consecutive parts of a batch, in the order in which they are added, without gradients.

    A part is made, asked about and then free before the next is made. A thread does it, in the same order, if there is `beside`, a
    context for the parts of each `add`, whose parts wait unmade: those of one `add` at most. Of a reward that is elsewhere (its
    spec) the thread asks alone: the caller makes the parts, which go to the CPU, at most AHEAD ahead.
    What the thread raises, the next `add` or `result` raises. As a context: an exception in it ends the thread after the part
    that it asks about, and with `beside` waits for that, since the thread works with what is the caller's."""

    def __init__(self, reward: Reward, beside: Callable[[], AbstractContextManager[object]] | None = None) -> None:
        self._reward, self._beside = reward, beside
        self._outputs: list[RewardOutput] = []
        self._prompts: list[str] = []
        self._samples: list[int] = []
        self._queue: queue.Queue[Iterable[RewardBatch] | None] = queue.Queue(AHEAD if beside is None else 1)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.waited = 0.0  # seconds in which the caller waited for the thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or self._thread is None:
            return
        self._stopped = True
        with suppress(queue.Empty):  # so that there is room for the end; nobody else puts
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        if self._beside is not None:
            self._thread.join()

    def add(self, parts: Iterable[RewardBatch]) -> None:
        """Parts that are made when they are asked for."""
        if self._beside is not None:
            with self._waiting():
                self._put(parts)
        elif self._reward.spec.elsewhere:
            for part in parts:
                with self._waiting():
                    self._put([part.to("cpu")])
                self._raise()
        else:
            self._ask(parts)
        self._raise()

    def result(self, max_fail_rate: float = 0.5) -> RewardOutput:
        """The answer on all parts. How many may fail is judged over all. elapsed: seconds of scoring."""
        if self._thread is not None:
            with self._waiting():
                self._queue.put(None)
                self._thread.join()
        self._raise()
        channels = channels_of(self._reward)
        output = cat(self._outputs or [replace(no_answer(0, len(channels)), channels=channels)])
        check_rate(self._reward.name, output, self._prompts, self._samples, max_fail_rate)
        return output

    def _put(self, parts: Iterable[RewardBatch]) -> None:
        if self._thread is None:  # a daemon: a run that is interrupted does not wait for a server
            self._thread = threading.Thread(target=self._work, name=f"reward {self._reward.name}", daemon=True)
            self._thread.start()
        self._queue.put(parts)

    def _work(self) -> None:
        while (parts := self._queue.get()) is not None:
            # after an error the rest is only taken, so that nobody waits to put it
            if self._error is None and not self._stopped:
                try:
                    with nullcontext() if self._beside is None else self._beside():
                        self._ask(parts)
                except BaseException as error:
                    self._error = error

    def _ask(self, parts: Iterable[RewardBatch]) -> None:
        for output in map(self._asked, parts):  # nothing else holds a part while the next is made
            self._outputs.append(output)
            if self._stopped:
                return

    def _asked(self, part: RewardBatch) -> RewardOutput:
        self._prompts += part.prompts
        self._samples += part.sample_ids
        return score(self._reward, part, max_fail_rate=1.0)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
