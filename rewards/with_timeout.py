"""Adds a timeout, sub-batching and an error policy (raise or mask) to a reward."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Literal

import torch

from rewards.answers import no_answer
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, RewardSpec, channels_of
from rewards.guard import score
from rewards.parts import in_chunks, wants_gradient

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class WithTimeout:
    """`reward`, called with at most `batch_size` samples at a time (None: all), each call within `timeout` seconds (None: no
    limit).

    on_error, for a call that raises, is late or answers in the wrong form: "raise" is a RewardError; "mask" logs it and
    leaves its samples without a score (the caller's `score` then raises if they are more than half of its batch); it needs a
    batch_size, which is how many samples a failure masks. Same name and components as `reward`. Not kept: a late call cannot
    be stopped, its thread goes on.
    """

    reward: Reward
    timeout: float | None = None
    on_error: Literal["raise", "mask"] = "raise"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "mask"):
            raise ValueError(f"got on_error={self.on_error!r}; expected 'raise' or 'mask'")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"got timeout={self.timeout}; expected seconds > 0, or None for no limit")
        if self.on_error == "mask" and self.batch_size is None:
            raise ValueError(
                "got on_error='mask' with batch_size=None, so one failure would mask all images at once; expected a batch_size: "
                "set batch_size=4, say, or on_error='raise'"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"got batch_size={self.batch_size}; expected at least 1, or None for all samples at once")

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        """The reward's."""
        return self.reward.spec

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return in_chunks(self._ask, batch, self.batch_size, groupwise=self.spec.groupwise)

    def _ask(self, batch: RewardBatch) -> RewardOutput:
        try:
            return _within(self.timeout, self.reward, batch, grad=wants_gradient(self.spec))
        except RewardError as error:
            if self.on_error == "raise":
                raise
            logger.warning("%s; its samples are masked", error)
            return no_answer(len(batch), len(channels_of(self.reward)), str(error))


def _within(timeout: float | None, reward: Reward, batch: RewardBatch, *, grad: bool) -> RewardOutput:
    """The checked answer; RewardError if there is none in time."""
    if timeout is None:
        return score(reward, batch, grad=grad, max_fail_rate=1.0)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    answers: list[RewardOutput] = []
    errors: list[BaseException] = []

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # the current device belongs to a thread
        try:
            answers.append(score(reward, batch, grad=grad, max_fail_rate=1.0))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"reward {reward.name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if errors:
        raise errors[0]
    if not answers:
        raise RewardError(f"reward {reward.name!r} gave no answer on {len(batch)} samples within {timeout:g} s")
    return answers[0]
