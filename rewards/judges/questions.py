"""Questions about an image whose answers are known: GenEval 2's Soft-TIFA (2512.16853), VQAScore (2404.01291)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import data_urls, first_reason, judged, numbers
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import expectation, forms, mass
from rewards.judges.template import Templates, Wording, load_templates

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LISTED = {
    "question": Wording(
        "{question} One word is enough.", ("0bb015599140a91f",), "_VQA_QUESTION_TEMPLATE", ("{question}",)
    )
}
ALONE = {
    "question": Wording(
        'Is this a picture of "{prompt}"? Say Yes or No.', ("dc3edcc73c635697",), "_VQA_TEMPLATE", ("{prompt}",)
    )
}


@dataclass(eq=False)
class Questions:
    """How probable the expected answers to questions about the image are, in [0, 1].

    The questions are metadata[key], a list of [question, answer] as in GenEval 2 (`vqa_list`); key None asks one, whether the
    image shows the prompt, with the answer Yes (VQAScore). p_i is the probability that the first token of answer i is the
    expected one, in any of its forms ("Yes", " yes"; "three", "3"). The score is their geometric mean ("gm", Soft-TIFA's, which
    UniRL trains with) or arithmetic mean ("am").
    versus: of a yes-or-no question, p(expected) / (p(yes) + p(no)) in place of p(expected): σ(log p(Yes) − log p(No)).

    A form outside the `top` likeliest tokens counts 0; the uncertainty is how much higher the score can be for that. Without
    questions, or if one was not answered, the sample is invalid. Components: lowest (of p_i), questions (their number),
    noncanonical_template. templates: one text, with {question} (or {prompt} if key is None); see `load_templates`.
    Not kept: answers of more than one token, of which no form is seen."""

    endpoint: ChatEndpoint
    key: str | None = "vqa_list"
    aggregate: Literal["gm", "am"] = "gm"
    versus: bool = False
    top: int = 20
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=1))
    templates: str | None = None
    name: str = "questions"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.aggregate not in ("gm", "am"):
            raise ValueError(f"got aggregate={self.aggregate!r}; expected 'gm' or 'am'")
        if self.top < 1:
            raise ValueError(f"got top={self.top}; expected at least 1, and 20 if the endpoint gives as many")
        self._templates = load_templates(self.templates, ALONE if self.key is None else LISTED)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(elsewhere=True, range=(0, 1), memory="XL", licence="code flowalign's own; weights as served")

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        asked = [self._asked(prompt, row) for prompt, row in zip(batch.prompts, batch.metadata, strict=True)]
        questions = [
            Question((url,), (text,), self.sampling, self.top)
            for url, own in zip(data_urls(batch.pixels()), asked, strict=True)
            for text, _ in own
        ]
        reads = [partial(self._read, expected) for own in asked for _, expected in own]
        table, texts = numbers(self.endpoint.ask(questions), reads, 2)
        rows, info = [], []
        for own, found, metadata in zip(asked, table.split([len(own) for own in asked]), batch.metadata, strict=True):
            said, texts = texts[: len(own)], texts[len(own) :]
            rows.append([*self._joined(found), len(own)])
            info.append(first_reason(found[:, 0].isnan().tolist(), said) if own else self._lacks(metadata))
        scores, unseen, lowest, count = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T
        return judged(scores, {"lowest": lowest, "questions": count}, info, self._templates, unseen)

    def _asked(self, prompt: str, metadata: dict[str, Any]) -> list[tuple[str, str]]:
        """(the text of a question, the expected answer) of a sample; [] if there are none, or not in this form."""
        text = self._templates.texts["question"]
        if self.key is None:
            return [(text.replace("{prompt}", prompt), "yes")]
        rows = metadata.get(self.key)
        good = isinstance(rows, (list, tuple)) and all(
            isinstance(row, (list, tuple)) and [type(each) for each in row] == [str, str] for row in rows
        )
        return (
            [(text.replace("{question}", question), answer.strip().lower()) for question, answer in rows or ()]
            if good
            else []
        )

    def _lacks(self, metadata: dict[str, Any]) -> str:
        return f"metadata[{self.key!r}] is {metadata.get(self.key or '')!r:.100}; expected a list of [question, answer]"

    def _read(self, expected: str, answer: Answer) -> list[float]:
        """p of the expected answer, and how much higher it can be."""
        if self.versus and expected in ("yes", "no"):
            return list(expectation(answer.top, {"yes": float(expected == "yes"), "no": float(expected == "no")}))
        digits = forms(str(NUMBERS.index(expected))) if expected in NUMBERS else []
        return list(mass(answer.top, [*forms(expected), *digits]))

    def _joined(self, found: Tensor) -> list[float]:
        """Score, how much higher it can be, lowest p; NaN without a question. found [n, 2]: p and how much higher."""
        if not len(found):
            return [torch.nan] * 3
        p, most = found[:, 0], found.sum(1).clamp(max=1)
        low, high = ((x.log().mean().exp() if self.aggregate == "gm" else x.mean()) for x in (p, most))
        return [float(low), float(high - low), float(p.amin())]
