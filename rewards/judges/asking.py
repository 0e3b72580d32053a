"""What judges share: pictures as data URLs, questions to numbers, numbers to a RewardOutput."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput
from rewards.judges.client import SHOWN, Answer, ChatEndpoint, Question
from rewards.judges.parse import Unreadable
from rewards.judges.template import Templates


def data_urls(images: Iterable[Tensor]) -> list[str]:
    """Each of the uint8 images [3, H, W] as a PNG, without loss (JPEG would be part of what is judged); equal images are
    encoded once."""
    known: dict[tuple[torch.Size, bytes], str] = {}
    keys = []
    for image in images:
        keys.append(key := (image.shape, image.numpy().tobytes()))
        if key not in known:
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG", compress_level=1)
            known[key] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [known[key] for key in keys]


def source_urls(conditions: Sequence[Sequence[Tensor]]) -> list[str]:
    """The first condition of each sample, "" where it has none."""
    sources = [images[0] if images else None for images in conditions]
    # a batch of one image each, for its check and its rounding
    pixels = [RewardBatch(prompts=[""], images=one[None]).pixels()[0] for one in sources if one is not None]
    urls = iter(data_urls(pixels))
    return ["" if one is None else next(urls) for one in sources]


def ask(
    endpoint: ChatEndpoint,
    questions: Sequence[Question | str],
    read: Callable[[Answer], Sequence[float]],
    width: int,
) -> tuple[Tensor, list[str]]:
    """`numbers` of the answers to `questions`. A text in place of a question is why it cannot be asked."""
    answers = iter(endpoint.ask([question for question in questions if not isinstance(question, str)]))
    known = [Answer(error=question) if isinstance(question, str) else next(answers) for question in questions]
    return numbers(known, [read] * len(known), width)


def numbers(
    answers: Sequence[Answer], reads: Sequence[Callable[[Answer], Sequence[float]]], width: int
) -> tuple[Tensor, list[str]]:
    """What the `reads` find in the answers, float64 [n, width], NaN where there is nothing; and per answer how it begins, or
    why nothing was found."""
    rows = [_row(answer, read, width) for answer, read in zip(answers, reads, strict=True)]
    table = torch.tensor([found for found, _ in rows], dtype=torch.float64).reshape(len(rows), width)
    return table, [text for _, text in rows]


def _row(answer: Answer, read: Callable[[Answer], Sequence[float]], width: int) -> tuple[list[float], str]:
    if answer.error:
        return [torch.nan] * width, answer.error
    try:
        return list(read(answer)), answer.text[:SHOWN]
    except Unreadable as error:
        cut = ", cut at max_tokens" if answer.cut else ""
        return [torch.nan] * width, f"{error}; the answer{cut}: {answer.text[:SHOWN]!r}"


def first_reason(failed: Sequence[bool], info: Sequence[str]) -> str:
    """The info of a sample from those of its questions: why the first one failed, else what the first answer says."""
    return next((text for bad, text in zip(failed, info, strict=True) if bad), info[0] if info else "")


def judged(
    scores: Tensor,
    parts: Mapping[str, Tensor],
    info: list[str],
    templates: Templates,
    uncertainty: Tensor | None = None,
) -> RewardOutput:
    """float32, valid where finite; with the component noncanonical_template, 0 or 1 for all samples."""
    flag = torch.full((len(scores),), float(templates.noncanonical))
    components = {name: part.float() for name, part in parts.items()} | {"noncanonical_template": flag}
    return RewardOutput(
        scores.float(),
        torch.isfinite(scores),
        components,
        info,
        uncertainty=None if uncertainty is None else uncertainty.float(),
    )
