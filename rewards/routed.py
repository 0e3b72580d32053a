"""Another reward for each kind of sample, as its metadata says: several tasks in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rewards.answers import at_rows, cat
from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, spec_of
from rewards.guard import score
from rewards.parts import check_one_channel, joint_spec, wants_gradient


@dataclass(frozen=True, eq=False)
class Routed:
    """The score of rewards[metadata[key]]: an OCR score for prompts of texts, GenEval's for prompts of objects. One channel.

    Each reward gets its own samples only, so it needs no metadata of the others, and a sample is valid if it is for its own. `default`: for
    values without a reward and samples without the key; None makes them a ValueError that names the value. Several values may share
    one reward. Components: those of the parts, as `value/component` (or `default/component`), NaN for the samples of others. Scores are compared within groups, of
    one prompt and so of one reward; what compares a batch (`std: batch`) mixes them, so mind the scales (`Standardized`).
    """

    key: str
    rewards: dict[str, Reward]
    default: Reward | None = None
    name: str = "routed"

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(f"got no rewards for the values of {self.key!r}; expected at least one")
        check_one_channel("routes", self.parts)
        self.spec  # noqa: B018 (checked at construction)

    @property
    def parts(self) -> list[Reward]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.rewards.values(), *([] if self.default is None else [self.default])]))

    @property
    def spec(self) -> RewardSpec:
        """The parts' together, one channel. Its range holds all of theirs, if all are known."""
        ranges = [spec_of(part).range for part in self.parts]
        known = [bounds for bounds in ranges if bounds is not None]
        lows, highs = zip(*known, strict=True) if len(known) == len(ranges) else ((), ())
        return replace(joint_spec("routes", self.parts), range=(min(lows), max(highs)) if lows else None)

    def load(self) -> None:
        for part in self.parts:
            part.load()

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        rows: dict[str | None, list[int]] = {}
        for row, metadata in enumerate(batch.metadata):
            rows.setdefault(self._route(metadata.get(self.key)), []).append(row)
        grad, answers = wants_gradient(self.spec), []
        for value, own in rows.items():
            part = self.default if value is None else self.rewards[value]
            assert part is not None  # else _route raises
            answer = score(part, batch.select(own), grad=grad, max_fail_rate=1.0)
            components = {f"{value or 'default'}/{name}": column for name, column in answer.components.items()}
            answers.append(replace(answer, components=components))
        order = torch.tensor([row for own in rows.values() for row in own]).argsort()
        return at_rows(cat(answers), order)

    def _route(self, value: object) -> str | None:
        """The key of `rewards`; None is the default."""
        if isinstance(value, str) and value in self.rewards:
            return value
        if self.default is None:
            raise ValueError(
                f"got metadata[{self.key!r}]={value!r:.100}, for which there is no reward; expected one of {list(self.rewards)}: "
                "add a reward for it, or a `default`"
            )
        return None
