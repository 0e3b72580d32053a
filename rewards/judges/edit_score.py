"""EditScore: how well an image was edited, in two questions to a vision-language model (2509.23909)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.judges.asking import ask, data_urls, first_reason, judged, source_urls
from rewards.judges.client import Answer, ChatEndpoint, Question, Sampling
from rewards.judges.parse import listed
from rewards.judges.template import Templates, Wording, load_templates

PARTS = ("prompt_following", "consistency", "perceptual_quality")
WORDINGS = {  # "10" stands for the largest number, which is put in its place
    "context": Wording(
        'You inspect pictures made by an image model, as a strict art director. Apply the rules that follow. Think in one or '
        'two sentences, then answer with one JSON object and nothing else: {"reasoning": "...", "score": [number, number]}\n',
        ("125d6dcfcbd41692",), "_context_no_delimit_reasoning_first",
    ),
    "two_images": Wording(
        "There are two pictures: the source, then the result of editing it. An edit that failed may leave them equal.\n",
        ("369c6b21479e6a85",), "_prompts_0shot_two_image_edit_rule",
    ),
    "edit": Wording(
        "Give two numbers from 0 to 10. The first: how far the result does what the instruction asks; 0 for nothing of it, 10 "
        "for all of it. The second: how far it leaves alone what the instruction does not mention; 0 for another scene, 10 "
        "for no needless change.\nThe instruction: <instruction>\n",
        ("5b9aa479977bc317",), "_prompts_0shot_tie_rule_SC", ("<instruction>",),
    ),
    "quality": Wording(
        "There is one picture. Give two numbers from 0 to 10. The first: how natural it looks in light, shadow and distance; "
        "0 for impossible, 10 for natural. The second: how free it is of flaws such as blur, noise, watermarks and broken "
        "shapes; 0 for full of them, 10 for none.\n",
        ("cd929b5619a3ad93",), "_prompts_0shot_rule_PQ",
    ),
}  # fmt: skip


@dataclass(eq=False)
class EditScore:
    """EditScore's overall score over 10, in [0, 1] (2509.23909; VectorSpaceLab/EditScore).

    The judge sees the source (the sample's first condition) and the result with the prompt as the instruction, and gives two
    numbers in [0, R]: success s1 and absence of over-editing s2. It sees the result alone, and gives naturalness q1 and
    absence of artifacts q2. With R = score_range (25), of one pass:

        SC = min(s1, s2) · 10/R,  PQ = min(q1, q2) · 10/R,  overall = sqrt(SC · PQ)

    passes: K, with seeds sampling.seed + 0 ... K − 1 (42, temperature 0.7, top_p 0.9, top_k 20 are its own; Avg@4 is what it
    trains with). reduction: "average_last" is the mean of overall; "average_first" sqrt(mean s1 · 10/R · mean PQ), without
    s2, as its single evaluation has it. A pass whose answers cannot be read is left out; without any the sample is invalid.
    Nothing stands in for an answer; the released batch path puts in a middle score.

    output: "overall", or "parts": channels prompt_following, consistency and perceptual_quality, the means of s1, s2 and PQ,
    each over R or 10. Components: those three and overall in 0..10, passes (that were read), noncanonical_template.
    Uncertainty: the sample standard deviation over the passes, NaN of fewer than two.
    templates: where the canonical texts are, see `load_templates` ("editscore.vie_prompts", if that is installed).
    Not kept: labels before images ("<img1>:"), which the Qwen2.5 variants were trained with; give them to the server as its
    chat template."""

    endpoint: ChatEndpoint
    passes: int = 1
    reduction: Literal["average_last", "average_first"] = "average_last"
    output: Literal["overall", "parts"] = "overall"
    score_range: int = 25
    sampling: Sampling = field(default_factory=partial(Sampling, temperature=0.7, top_p=0.9, top_k=20))
    templates: str | None = None
    name: str = "edit_score"
    _templates: Templates = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.passes < 1 or self.score_range < 1:
            raise ValueError(f"got passes={self.passes}, score_range={self.score_range}; expected at least 1 of each")
        for key, value, known in (
            ("reduction", self.reduction, ("average_last", "average_first")),
            ("output", self.output, ("overall", "parts")),
        ):
            if value not in known:
                raise ValueError(f"got {key}={value!r}; expected one of {known}")
        self._templates = load_templates(self.templates, WORDINGS)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            inputs=("images", "conditions"),
            elsewhere=True,
            channels=PARTS if self.output == "parts" else (),
            range=(0, 1),
            memory="XL",
            licence="code Apache-2.0; weights as served (EditScore's Apache-2.0, and the licence of their base)",
        )

    def load(self) -> None:
        self.endpoint.load()

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.conditions is not None
        sources, results = source_urls(batch.conditions), data_urls(batch.pixels())
        questions: list[Question | str] = []
        for source, result, instruction in zip(sources, results, batch.prompts, strict=True):
            if not source:
                questions += ["no source image: its conditions are empty"] * (2 * self.passes)
                continue
            for number in range(self.passes):
                questions += self._pass(source, result, instruction, number)
        table, info = ask(self.endpoint, questions, self._read, 2)
        passes = table.reshape(len(batch), self.passes, 2, 2) * 10 / self.score_range
        bad = table.isnan().any(1).reshape(len(batch), -1).tolist()
        size = 2 * self.passes
        reasons = [first_reason(bad[i], info[i * size : (i + 1) * size]) for i in range(len(batch))]
        return self._output(passes, reasons)

    def _pass(self, source: str, result: str, instruction: str, number: int) -> list[Question]:
        texts, sampling = self._templates.texts, vars(self.sampling)
        drawn = Sampling(**(sampling | {"seed": self.sampling.seed + number}))
        edit, quality = (texts[name].replace("10", str(self.score_range)) for name in ("edit", "quality"))
        edit = "\n".join([texts["context"], texts["two_images"], edit.replace("<instruction>", instruction)])
        quality = "\n".join([texts["context"], quality])
        return [Question((source, result), (edit,), drawn), Question((result,), (quality,), drawn)]

    def _read(self, answer: Answer) -> list[float]:
        return listed(answer.text, "score", 2, 0, self.score_range)

    def _output(self, passes: Tensor, info: list[str]) -> RewardOutput:
        """passes [n, K, 2, 2] in 0..10: pass, question (edit, quality), number."""
        read = passes.isfinite().all(-1).all(-1)
        passes = passes.masked_fill(~read[:, :, None, None], torch.nan)
        quality = passes[:, :, 1].amin(-1)  # amin keeps NaN
        overall = (passes[:, :, 0].amin(-1) * quality).sqrt()
        per_pass = torch.stack([passes[:, :, 0, 0], passes[:, :, 0, 1], quality, overall], -1)
        mean = per_pass.nanmean(1)
        if self.reduction == "average_first":
            mean[:, 3] = (mean[:, 0] * mean[:, 2]).sqrt()
        parts = {name: mean[:, column] for column, name in enumerate((*PARTS, "overall"))}
        columns = slice(0, 3) if self.output == "parts" else 3
        scores, spread = mean[:, columns] / 10, _spread(per_pass, read)[:, columns] / 10
        return judged(
            scores, parts | {"passes": read.sum(1)}, info, self._templates, spread if self.passes > 1 else None
        )


def _spread(values: Tensor, read: Tensor) -> Tensor:
    """The sample standard deviation [n, C] of values [n, K, C] over the passes that were read [n, K]; NaN of fewer than two."""
    count = read.sum(1)[:, None]
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()
