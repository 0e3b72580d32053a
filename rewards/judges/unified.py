"""UnifiedReward: a score of each image, or a win rate inside a group from judgments of two images (2503.05236, 2508.20751)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, first_reason, judged
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import labelled, share_of_first, verdict
from rewards.judges.template import Templates, Wording, load_templates

LICENCE = "code MIT; weights as served (UnifiedReward's as their base)"
AXES = {1: ("Final Score",), 2: ("Alignment Score", "Coherence Score", "Style Score")}
PROMPT = ("{prompt}",)
POINT = {
    1: Wording(
        "Here is a picture and the caption that it was made from. Judge two things: does it show what the caption says, with "
        "the right things, relations and attributes; and how good is the picture, in sharpness, detail, color and beauty? "
        "Name the elements of the caption with 1 if they are there and 0 if not, then end with one number from 1 to 5 in the "
        "form\nFinal Score: X\nCaption: [{prompt}]",
        ("f56f919ce3bc6aab", "d68ab1dcf4dc3a39"), "question", PROMPT,
    ),
    2: Wording(
        "Here is a picture and the caption that it was made from. Judge it on three axes, each from 1 to 5 with decimals: "
        "does its content match the caption; is it coherent, without glitches and distorted things; is it beautiful, whatever "
        "the caption? Answer in this form:\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n"
        "Caption: [{prompt}]",
        ("75d52d3ae771f89b",), "problem", PROMPT,
    ),
}  # fmt: skip
PAIR = {
    1: Wording(
        "Here are two pictures that were made from one caption. Which one shows better what the caption says, and is the better "
        "picture? End with one of the sentences: Image 1 is better. Image 2 is better. Both images are equally good.\n"
        "Caption: [{prompt}]",
        ("0fd2f5c43a065165",), "problem", PROMPT,
    ),
    2: Wording(
        "Here are two pictures that were made from one caption. On each of three axes, share 1.0 out between them, more to the "
        "better one: content that matches the caption; coherence, without glitches; beauty, whatever the caption. Answer in "
        "this form:\nAlignment Score:\n Image 1: X\n Image 2: Y\n\nCoherence Score:\n Image 1: X\n Image 2: Y\n\n"
        "Style Score:\n Image 1: X\n Image 2: Y\n\nCaption: [{prompt}]",
        ("828e9ab2f81c3b6d",), "problem", PROMPT,
    ),
}  # fmt: skip


@dataclass(eq=False)
class UnifiedReward:
    """The score that UnifiedReward gives an image (2503.05236; CodeGoat24/UnifiedReward).

    version 1 (1.0 and 1.5): "Final Score" f in 1..5; the score is f / 5, as in flow_grpo, in [0.2, 1]. version 2 (2.0):
    alignment, coherence and style, each in 1..5; the score is (mean − 1) / 4 in [0, 1], as in verl-omni. An axis that is
    missing makes the sample invalid. Answers are greedy. Components: the axes as they were given, noncanonical_template.
    templates: see `load_templates` (point_score_ACS_image_generation.py of its repository, for version 2).
    Not kept: flow_grpo's resize to 512 x 512; videos. Scores of good images differ little: normalize within the group."""

    endpoint: ChatEndpoint
    version: Literal[1, 2] = 2
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=4096))
    templates: str | None = None
    name: str = "unified_reward"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.version)
        self._templates = load_templates(self.templates, {"point": POINT[self.version]})

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(elsewhere=True, range=(0.2, 1) if self.version == 1 else (0, 1), memory="XL", licence=LICENCE)

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        text, axes = self._templates.texts["point"], AXES[self.version]
        questions = [
            Question((url,), (text.replace("{prompt}", prompt),), self.sampling)
            for url, prompt in zip(data_urls(batch.pixels()), batch.prompts, strict=True)
        ]
        table, info = ask(self.endpoint, questions, self._read, len(axes))
        mean = table.mean(1)
        scores = mean / 5 if self.version == 1 else (mean - 1) / 4
        names = [axis.lower().replace(" ", "_").replace("_score", "") for axis in axes]
        return judged(scores, dict(zip(names, table.T, strict=True)), info, self._templates)

    def _read(self, answer: Answer) -> list[float]:
        return [labelled(answer.text, axis, 1, 5) for axis in AXES[self.version]]


@dataclass(eq=False)
class UnifiedWinRate:
    """The share of comparisons with others of its group that a sample wins, in [0, 1], a judge seeing both images at once
    (Pref-GRPO, 2508.20751).

        v(i, j) = 1 if i, shown first, is better than j, 1/2 for a tie, else 0
        p_ij = (v(i, j) + 1 − v(j, i)) / 2,  w_i = mean_j p_ij

    opponents: None compares all pairs, G·(G−1) questions; k compares each sample with at least k others, its neighbors in a
    ring that is drawn by `seed` and the images. both_orders: False asks each pair once, as Pref-GRPO does: half the
    questions, and the judge's bias for the first image stays. version 1 reads a verdict (1.x, Think: "Image 1 is better"),
    version 2 the mean share of the three axes; the larger one wins.
    A pair of which an answer cannot be read is left out; a sample without any pair is invalid, one alone in its group too.
    Components: comparisons (pairs that were read), same_in_both_orders (the share of them in which the order of the images
    did not matter), noncanonical_template.

    Groupwise. w is a rate already: take
    flowalign.advantage.Normalized; WinRate would rank it once more, and is for rewards that score one image.
    Not kept: the size of a win."""

    endpoint: ChatEndpoint
    version: Literal[1, 2] = 2
    opponents: int | None = None
    both_orders: bool = True
    seed: int = 0
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=4096))
    templates: str | None = None
    name: str = "unified_win_rate"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.version)
        if self.opponents is not None and self.opponents < 1:
            raise ValueError(f"got opponents={self.opponents}; expected at least 1, or None for all of the group")
        self._templates = load_templates(self.templates, {"pair": PAIR[self.version]})

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(elsewhere=True, range=(0, 1), groupwise=True, memory="XL", licence=LICENCE)

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        urls = data_urls(batch.pixels())
        pairs = self._pairs(batch, urls)
        orders = [shown for a, b in pairs for shown in ([(a, b), (b, a)] if self.both_orders else [(a, b)])]
        text = self._templates.texts["pair"]
        questions = [
            Question((urls[a], urls[b]), (text.replace("{prompt}", batch.prompts[a]),), self.sampling)
            for a, b in orders
        ]
        table, info = ask(self.endpoint, questions, self._read, 1)
        first = table.reshape(len(pairs), 1 + self.both_orders)
        wins = (first[:, 0] + 1 - first[:, 1]) / 2 if self.both_orders else first[:, 0]
        same = (first.sum(1) == 1).double() if self.both_orders else torch.full_like(wins, torch.nan)
        return self._rates(len(batch), pairs, wins, same, _texts(len(batch), orders, table[:, 0], info))

    def _pairs(self, batch: RewardBatch, urls: Sequence[str]) -> list[tuple[int, int]]:
        """Rows of the batch. Which pairs there are does not depend on the order of the batch."""
        groups: dict[int, list[int]] = {}
        for row, group in enumerate(batch.group_ids):
            groups.setdefault(group, []).append(row)
        keys = [hashlib.sha256(f"{self.seed} {url}".encode()).hexdigest() for url in urls]
        rings = [sorted(rows, key=lambda row: (keys[row], batch.sample_ids[row])) for rows in groups.values()]
        return [pair for ring in rings for pair in pairs_in_ring(ring, self.opponents)]

    def _read(self, answer: Answer) -> list[float]:
        if self.version == 1:
            return [verdict(answer.text)]
        share = sum(share_of_first(answer.text, axis) for axis in AXES[2]) / 3
        return [0.5 if abs(share - 0.5) < 1e-6 else float(share > 0.5)]

    def _rates(
        self, count: int, pairs: Sequence[tuple[int, int]], wins: Tensor, same: Tensor, info: list[str]
    ) -> RewardOutput:
        """wins [P]: p_ab of each pair (a, b), NaN where it was not read; same [P] 1 where both orders agree."""
        read = wins.isfinite()
        ends = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)[read]
        both = torch.cat([ends[:, 0], ends[:, 1]])

        def total(values: Tensor) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add_(0, both, values)

        met = total(torch.ones(len(both), dtype=torch.float64))
        rates = total(torch.cat([wins[read], 1 - wins[read]])) / met  # 0 / 0 is NaN: no pair, no score
        agreed = total(torch.cat([same[read]] * 2)) / met
        info = [text or "it is alone in its group" for text in info]
        return judged(rates, {"comparisons": met, "same_in_both_orders": agreed}, info, self._templates)


def pairs_in_ring(ring: Sequence[int], opponents: int | None) -> list[tuple[int, int]]:
    """All pairs of a ring (None), or those at most ceil(opponents / 2) places apart, so that each is in at least `opponents`."""
    if opponents is None or opponents >= len(ring) - 1:
        return list(combinations(ring, 2))
    apart = range(1, (opponents + 1) // 2 + 1)
    pairs = {frozenset((place, (place + step) % len(ring))): None for step in apart for place in range(len(ring))}
    return [(ring[min(pair)], ring[max(pair)]) for pair in pairs]


def _texts(count: int, orders: Sequence[tuple[int, int]], read: Tensor, info: list[str]) -> list[str]:
    """Per sample why the first question about it failed, else the first answer about it; "" without a question."""
    bad = read.isnan().tolist()
    about = [[number for number, pair in enumerate(orders) if row in pair] for row in range(count)]
    return [first_reason([bad[i] for i in own], [info[i] for i in own]) for own in about]


def _check(version: int) -> None:
    if version not in (1, 2):
        raise ValueError(f"got version={version!r}; expected 1 (UnifiedReward 1.x) or 2 (2.0)")
