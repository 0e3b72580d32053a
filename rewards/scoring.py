"""Scores of many batches as one answer, in a thread if the reward is computed elsewhere."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Self

from rewards.answers import cat, no_answer
from rewards.base import Reward, RewardBatch, RewardOutput, channels_of
from rewards.guard import check_rate, score

AHEAD = 4  # batches that wait at most, decoded and in memory


class Scoring:
    """The answers on consecutive parts of a batch, in the order in which they are added, without gradients.

    A reward that is elsewhere (its spec) is asked in a thread, in this order, so that the caller makes the next part
    meanwhile, at most AHEAD parts ahead; its parts go to the CPU. Any other is asked at once, and the part is then free.
    What the reward raises, the next `add` or `result` raises. As a context: an exception in it ends the thread after the part
    that it asks about."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._outputs: list[RewardOutput] = []
        self._prompts: list[str] = []
        self._samples: list[int] = []
        self._queue: queue.Queue[RewardBatch | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.waited = 0.0  # seconds in which the caller waited for scores

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

    def add(self, part: RewardBatch) -> None:
        self._prompts += part.prompts
        self._samples += part.sample_ids
        began = time.perf_counter()
        if not self._reward.spec.elsewhere:
            self._outputs.append(score(self._reward, part, max_fail_rate=1.0))
        else:
            if self._thread is None:  # a daemon: a run that is interrupted does not wait for a server
                self._thread = threading.Thread(target=self._work, name=f"reward {self._reward.name}", daemon=True)
                self._thread.start()
            self._queue.put(part.to("cpu"))
        self.waited += time.perf_counter() - began
        self._raise()

    def result(self, max_fail_rate: float = 0.5) -> RewardOutput:
        """The answer on all parts. How many may fail is judged over all. elapsed: seconds of scoring."""
        began = time.perf_counter()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self.waited += time.perf_counter() - began
        self._raise()
        channels = channels_of(self._reward)
        output = cat(self._outputs or [replace(no_answer(0, len(channels)), channels=channels)])
        check_rate(self._reward.name, output, self._prompts, self._samples, max_fail_rate)
        return output

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            # after an error the rest is only taken, so that nobody waits to put it
            if self._error is None and not self._stopped:
                try:
                    self._outputs.append(score(self._reward, part, max_fail_rate=1.0))
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
