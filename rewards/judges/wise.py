"""WISE: does an image show what its prompt implies? Consistency, realism and beauty by a strict judge (2503.07265)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, judged
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import labelled
from rewards.judges.template import Templates, Wording, load_templates

WEIGHTS = {"Consistency": 0.7, "Realism": 0.2, "Aesthetic Quality": 0.1}
RUBRIC = Wording(
    "Judge a picture strictly, with 0, 1 or 2 on each of three axes; 2 is for what has no fault at all. Consistency: does it "
    "show all that the prompt asks for, as the explanation says it is meant? Realism: could it be a photograph? Aesthetic "
    "Quality: is it well composed and beautiful? Answer with three lines and nothing else:\nConsistency: X\nRealism: X\n"
    "Aesthetic Quality: X\nThe prompt: {prompt}\nThe explanation: {explanation}",
    placeholders=("{prompt}", "{explanation}"),
)


@dataclass(eq=False)
class WISE:
    """WiScore (0.7·C + 0.2·R + 0.1·A) / 2 in [0, 1], of consistency, realism and aesthetic quality in 0..2 (2503.07265;
    PKU-YuanGroup/WISE, Tencent-Hunyuan/UniRL).

    metadata[explanation_key] says what the prompt means; without it, or without one of the three numbers, the sample is
    invalid. Temperature 0.2, as UniRL: greedy judges gave nearly all images the lowest level. Components: consistency,
    realism, aesthetic_quality, noncanonical_template (always 1: no canonical text is known here).
    Not kept: WISE's order, the text before the image."""

    endpoint: ChatEndpoint
    explanation_key: str = "explanation"
    sampling: Sampling = field(default_factory=partial(Sampling, temperature=0.2))
    templates: str | None = None
    name: str = "wise"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._templates = load_templates(self.templates, {"rubric": RUBRIC})

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(elsewhere=True, range=(0, 1), memory="XL", licence="code flowalign's own; weights as served")

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        text, questions = self._templates.texts["rubric"], list[Question | str]()
        for url, prompt, metadata in zip(data_urls(batch.pixels()), batch.prompts, batch.metadata, strict=True):
            meant = metadata.get(self.explanation_key)
            if isinstance(meant, str):
                filled = text.replace("{explanation}", meant).replace("{prompt}", prompt)
                questions.append(Question((url,), (filled,), self.sampling))
            else:
                questions.append(f"metadata[{self.explanation_key!r}] is {meant!r:.100}; expected a text")
        table, info = ask(self.endpoint, questions, _read, 3)
        scores = (table * torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)).sum(1) / 2
        names = [axis.lower().replace(" ", "_") for axis in WEIGHTS]
        return judged(scores, dict(zip(names, table.T, strict=True)), info, self._templates)


def _read(answer: Answer) -> list[float]:
    return [labelled(answer.text, axis, 0, 2) for axis in WEIGHTS]
