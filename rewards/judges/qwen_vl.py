"""QwenVL score: how beautiful an image is, by a rubric of five levels, as flow_grpo asks a vision-language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, judged
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import tagged
from rewards.judges.template import Templates, Wording, load_templates

RUBRIC = Wording(
    "Judge how beautiful the picture is. 1: hardly anything can be made out. 2: blurred or badly lit, pale, clumsily framed. "
    "3: sharp and well lit enough, but dull. 4: crisp, vivid, well composed. 5: outstanding in light, color and composition, "
    "and moving. First weigh it in <Thought>...</Thought>, then give the level as a number: <Score>X</Score>",
    ("14a112e01d0fd4ce",), "self.task",
)  # fmt: skip


@dataclass(eq=False)
class QwenVL:
    """The level 1..5 that the judge gives an image, over 5: in [0.2, 1] (yifan123/flow_grpo, flow_grpo/qwenvl.py, with
    Qwen2.5-VL-7B-Instruct).

    The prompt is not part of the question: it is a reward of beauty alone. An answer without a level makes the sample invalid
    (flow_grpo: 0). Component: noncanonical_template. templates: see `load_templates` (that file)."""

    endpoint: ChatEndpoint
    sampling: Sampling = field(default_factory=partial(Sampling, max_tokens=2048))
    templates: str | None = None
    name: str = "qwen_vl"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._templates = load_templates(self.templates, {"rubric": RUBRIC})

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(elsewhere=True, range=(0.2, 1), memory="XL", licence="code MIT; weights as served")

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        text = self._templates.texts["rubric"]
        questions = [Question((url,), (text,), self.sampling) for url in data_urls(batch.pixels())]
        table, info = ask(self.endpoint, questions, _read, 1)
        return judged(table[:, 0] / 5, {}, info, self._templates)


def _read(answer: Answer) -> list[float]:
    return [tagged(answer.text, "Score", 1, 5)]
