"""DeQA: image quality as the expected level of five words, from the probabilities of an answer's first token (2501.11561)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, judged
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import expectation
from rewards.judges.template import Templates, Wording, load_templates

LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
WORDINGS = {
    "question": Wording("Is the quality of this picture excellent, good, fair, poor or bad?", ("a82e8a4ac0f33030",)),
    "answer": Wording("Its quality is", ("ed42da47d084972d",)),
}


@dataclass(eq=False)
class DeQA:
    """E / 5 in [0.2, 1], E = Σ_k k · p_k / Σ_k p_k over excellent (5), good, fair, poor, bad (1), p_k being the probability
    that the answer goes on with that word (DeQA-Score, 2501.11561; over 5 as in yifan123/flow_grpo's use).

    The answer is begun for the judge, which the endpoint has to support (vLLM: continue_final_message), as it has to give the
    probabilities of the `top` likeliest tokens (vLLM: up to --max-logprobs). Exact if the words are among them; the
    uncertainty is how far E / 5 can be off if not, and more than 2 % of the range makes the sample invalid. So does an answer
    that goes on with none of the words (less than 10 % together). A level word of more than one token is not seen.
    Deterministic. Components: level (E), noncanonical_template. templates: a folder with question.txt and answer.txt.
    Not kept: the model. DeQA-Score-Mix3 is mPLUG-Owl2 with code of its own, which pads images to squares with their mean
    color; whatever the endpoint serves is asked in its way."""

    endpoint: ChatEndpoint
    top: int = 20
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=1))
    templates: str | None = None
    name: str = "deqa"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"got top={self.top}; expected at least 1, and 20 if the endpoint gives as many")
        self._templates = load_templates(self.templates, WORDINGS)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            elsewhere=True,
            range=(0.2, 1),
            memory="XL",
            licence="code flowalign's own (the licence of DeQA-Score was not checked); weights as served",
        )

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        turns = (self._templates.texts["question"], self._templates.texts["answer"])
        questions = [Question((url,), turns, self.sampling, self.top) for url in data_urls(batch.pixels())]
        table, info = ask(self.endpoint, questions, _read, 2)
        return judged(table[:, 0] / 5, {"level": table[:, 0]}, info, self._templates, table[:, 1] / 5)


def _read(answer: Answer) -> list[float]:
    return list(expectation(answer.top, LEVELS))
