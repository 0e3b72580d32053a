"""PARM: can an image that is not finished yet become what the prompt asks for (2501.13926)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, judged, source_urls
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import expectation
from rewards.judges.template import Templates, Wording, load_templates

PROMPT = ("{prompt}",)
WORDINGS = {
    "clear": Wording(
        "This picture is an intermediate one of a generator that was asked for: {prompt}. It will get better. Is it clear "
        "enough to tell whether it can become what was asked for? Say yes or no, in lower case, without a full stop.",
        placeholders=PROMPT,
    ),
    "potential": Wording(
        "Can it become what was asked for: {prompt}? Say yes or no, in lower case, without a full stop.",
        placeholders=PROMPT,
    ),
    "match": Wording(
        "A generator was asked for: {prompt}. Does this picture show exactly that? Say yes or no, in lower case, without a "
        "full stop.",
        placeholders=PROMPT,
    ),
}

SOURCES = "There are two pictures: the source, then the one that is meant, which is being edited from it.\n"


@dataclass(eq=False)
class PARM:
    """P(yes) in [0, 1] of an image that is finished (σ = 0): does it match the prompt; and of a predicted x̂0 (σ > 0): can it
    become one that does (2501.13926; ZiyuGuo99/Image-Generation-CoT).

    Of an intermediate image the judge is asked first whether it is clear enough, P(clear) >= 1/2, then, as if it had said yes,
    for its potential. One that is not clear has no score, or that of `unclear`: ½ ranks it behind those with potential and before those without, as a
    selection of paths has it (an early step where nothing is clear would fail a run otherwise). require_clear False takes its
    potential all the same. P(yes) = p(yes) / (p(yes) + p(no)) of the answer's first token: one forward,
    where the released code samples. Best of a group: `best_of`.

    sources: shows the judge the sample's source image (its first condition) before the picture; for edits, whose prompt says what to change.

    σ of a sample: metadata[sigma_key], else the batch's, else `sigma`; without any it is invalid. Uncertainty: how far P can
    be off by words outside the `top` likeliest tokens. Components: clear, potential, match (NaN where not asked),
    noncanonical_template (always 1: no canonical text is known here).

    Not kept: a batch of previews says σ = 0 of its clean estimates, or nothing, so set `sigma` for a reward of previews; the
    first clear step of a candidate is not remembered, since nothing names a candidate from step to step."""

    endpoint: ChatEndpoint
    sigma: float | None = None
    sigma_key: str = "sigma"
    require_clear: bool = True
    unclear: float | None = None
    sources: bool = False
    top: int = 20
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=1))
    templates: str | None = None
    name: str = "parm"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise ValueError(f"got sigma={self.sigma}; expected 0 (finished) to 1 (noise), or None")
        if self.unclear is not None and not 0 <= self.unclear <= 1:
            raise ValueError(f"got unclear={self.unclear}; expected 0 to 1, or None for no score")
        if self.top < 1:
            raise ValueError(f"got top={self.top}; expected at least 1, and 20 if the endpoint gives as many")
        self._templates = load_templates(self.templates, WORDINGS)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            inputs=("images", "conditions") if self.sources else ("images",),
            elsewhere=True,
            range=(0, 1),
            memory="XL",
            licence="code flowalign's own (Image-Generation-CoT's has no licence); weights as served",
        )

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        """Clarity is asked of all intermediate images at once, then what the others depend on."""
        levels, shown = self._levels(batch), self._shown(batch)
        clear, why = self._ask([
            self._question(urls, prompt, "clear") if isinstance(level, float) and level > 0 else "not asked"
            for urls, prompt, level in zip(shown, batch.prompts, levels, strict=True)
        ])  # fmt: skip
        questions: list[Question | str] = []
        for row, (urls, prompt, level) in enumerate(zip(shown, batch.prompts, levels, strict=True)):
            chance = float(clear[row, 0])
            if isinstance(level, str) or level == 0:
                questions.append(level if isinstance(level, str) else self._question(urls, prompt, "match"))
            elif self.require_clear and not chance >= 0.5:
                questions.append(
                    why[row] if chance != chance else f"not clear enough to judge: P(clear) = {chance:.2f}"
                )
            else:
                questions.append(self._question(urls, prompt, "clear", "yes", "potential"))
        found, info = self._ask(questions)
        finished = torch.tensor([level == 0 for level in levels])
        scores = found[:, 0]
        parts = {
            "clear": clear[:, 0],
            "potential": scores.masked_fill(finished, torch.nan),
            "match": scores.masked_fill(~finished, torch.nan),
        }
        if self.unclear is not None and self.require_clear:
            found = torch.where((clear[:, :1] < 0.5), torch.tensor([self.unclear, 0.0]), found)
        return judged(found[:, 0], parts, info, self._templates, found[:, 1])

    def _shown(self, batch: RewardBatch) -> list[tuple[str, ...]]:
        """The pictures of each sample's questions."""
        pictures = data_urls(batch.pixels())
        if not self.sources:
            return [(picture,) for picture in pictures]
        assert batch.conditions is not None
        return [*zip(source_urls(batch.conditions), pictures, strict=True)]

    def _levels(self, batch: RewardBatch) -> list[float | str]:
        """σ of each sample, or why it is not known."""
        own = [self.sigma] * len(batch) if batch.sigma is None else batch.sigma.tolist()
        return [
            _level(row.get(self.sigma_key, default), self.sigma_key)
            for row, default in zip(batch.metadata, own, strict=True)
        ]

    def _question(self, urls: tuple[str, ...], prompt: str, *turns: str) -> Question | str:
        """turns: names of templates, and the answer that is taken as given. A text for a sample without a source."""
        if not all(urls):
            return "no source image: its conditions are empty"
        texts = self._templates.texts
        first, *rest = (texts[name].replace("{prompt}", prompt) if name in texts else name for name in turns)
        return Question(urls, (SOURCES * self.sources + first, *rest), self.sampling, self.top)

    def _ask(self, questions: Sequence[Question | str]) -> tuple[Tensor, list[str]]:
        return ask(self.endpoint, questions, _read, 2)


def best_of(potential: Tensor, match: Tensor, groups: Sequence[int]) -> dict[int, int]:
    """The row that PARM takes of each group: of those with potential >= 1/2 the one of the largest `match`, P(yes) of the
    finished image; if there is none, the one of the largest potential. All [n]; ties go to the first.

    A potential of NaN (never clear) counts below all others, a match of NaN is not taken if another is there."""
    has = potential >= 0.5
    low = potential.nan_to_num(nan=-1.0) - 4  # of those without potential, in [-5, -3.5]
    keys = torch.where(has, match.nan_to_num(nan=-1.0), low).tolist()
    best: dict[int, int] = {}
    for row, group in enumerate(groups):
        if group not in best or keys[row] > keys[best[group]]:
            best[group] = row
    return best


def _level(value: Any, key: str) -> float | str:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    return (
        float(value)
        if good
        else f"its sigma is {value!r:.100}; expected 0 to 1 in metadata[{key!r}], in the batch or as PARM.sigma"
    )


def _read(answer: Answer) -> list[float]:
    return list(expectation(answer.top, {"yes": 1.0, "no": 0.0}))
