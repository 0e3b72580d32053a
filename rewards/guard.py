"""`score`: every caller asks a reward through it, so that a failure never becomes a number."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput


def score(reward: Reward, batch: RewardBatch, *, max_fail_rate: float = 0.5) -> RewardOutput:
    """The reward's answer, without gradients, checked.

    * A sample whose image is not finite is invalid; the reward does not get it.
    * A non-finite score, or one the reward marks invalid, is NaN with valid False (its components too).
    * An exception, or an answer of the wrong form (length, dtype), is a RewardError.
    * More than `max_fail_rate` of the batch invalid in an answer is a RewardError.
    """
    started = time.perf_counter()
    finite = _finite_rows(batch)
    asked = batch if bool(finite.all()) else batch.select(finite)
    try:
        with torch.no_grad():
            answer = reward(asked) if len(asked) else _nothing(0)
    except Exception as error:
        reason = f"reward {reward.name!r} failed on {len(asked)} samples: {type(error).__name__}: {error}"
        raise RewardError(reason) from error
    _check_form(reward.name, answer, len(asked))
    output = _to_all_rows(_masked(answer), finite)
    _check_rate(reward.name, output, batch, max_fail_rate)
    return replace(output, elapsed=time.perf_counter() - started)


def _finite_rows(batch: RewardBatch) -> Tensor:
    """bool [N] on the CPU: the samples whose images are finite everywhere."""
    if batch.images is None:
        return torch.ones(len(batch), dtype=torch.bool)
    return torch.isfinite(batch.images.detach()).flatten(1).all(dim=1).cpu()


def _check_form(name: str, answer: RewardOutput, count: int) -> None:
    if not isinstance(answer, RewardOutput):
        raise RewardError(f"got {type(answer).__name__} from reward {name!r}; expected a RewardOutput")
    named = {"scores": answer.scores, **{f"components[{key!r}]": part for key, part in answer.components.items()}}
    expected = [(key, part, torch.float32) for key, part in named.items()] + [("valid", answer.valid, torch.bool)]
    for key, part, dtype in expected:
        if not isinstance(part, Tensor):
            raise RewardError(f"reward {name!r}: {key} is {type(part).__name__}; expected a tensor")
        if part.shape != (count,):
            raise RewardError(
                f"reward {name!r}: {key} has shape {list(part.shape)}; expected [{count}], one per sample"
            )
        if part.dtype != dtype:
            raise RewardError(f"reward {name!r}: {key} is {part.dtype}; expected {dtype}")
    if answer.info and len(answer.info) != count:
        raise RewardError(f"reward {name!r}: info has {len(answer.info)} entries for {count} samples; one per sample")


def _masked(answer: RewardOutput) -> RewardOutput:
    """On the CPU, with NaN wherever there is no score, so that no number can be used by mistake."""
    scores, claimed = answer.scores.detach().cpu(), answer.valid.cpu()
    valid = claimed & torch.isfinite(scores)
    info = list(answer.info) or [""] * len(scores)
    for i in (claimed & ~valid).nonzero().flatten().tolist():
        info[i] = f"the score is {scores[i].item()}; {info[i]}".removesuffix("; ")
    components = {name: part.detach().cpu().masked_fill(~valid, torch.nan) for name, part in answer.components.items()}
    return RewardOutput(scores.masked_fill(~valid, torch.nan), valid, components, info)


def _to_all_rows(output: RewardOutput, finite: Tensor) -> RewardOutput:
    """The answer on the `finite` [N] samples as one on all N; the others are invalid."""
    if bool(finite.all()):
        return output
    rows = finite.nonzero().flatten()
    unscored = _nothing(len(finite), "its image is not finite")
    info = list(unscored.info)
    for row, text in zip(rows.tolist(), output.info, strict=True):
        info[row] = text
    components = {name: unscored.scores.index_copy(0, rows, part) for name, part in output.components.items()}
    scores, valid = (
        unscored.scores.index_copy(0, rows, output.scores), unscored.valid.index_copy(0, rows, output.valid)
    )  # fmt: skip
    return RewardOutput(scores, valid, components, info)


def _nothing(count: int, info: str = "") -> RewardOutput:
    return RewardOutput(torch.full((count,), torch.nan), torch.zeros(count, dtype=torch.bool), {}, [info] * count)


def _check_rate(name: str, output: RewardOutput, batch: RewardBatch, max_fail_rate: float) -> None:
    failed = (~output.valid).nonzero().flatten().tolist()
    if len(failed) > max_fail_rate * len(batch):
        first = failed[0]
        raise RewardError(
            f"reward {name!r}: {len(failed)} of {len(batch)} samples have no score, more than max_fail_rate "
            f"{max_fail_rate:g} allows. The first, sample {batch.sample_ids[first]} "
            f"(prompt {batch.prompts[first]!r}): {output.info[first] or 'no reason given'}"
        )
