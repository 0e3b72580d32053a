"""`score`: every caller asks a reward through it, so that a failure never becomes a number. `close` ends one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from rewards.answers import at_rows, no_answer
from rewards.base import Input, Reward, RewardBatch, RewardError, RewardOutput, channels_of, spec_of
from rewards.duplicates import first_of_equals
from rewards.isolation import isolated

MAX_FAIL_RATE = 0.5  # of the samples of a batch, or of all parts of one, that may have no score


def score(reward: Reward, batch: RewardBatch, *, grad: bool = False, max_fail_rate: float = 0.5) -> RewardOutput:
    """The reward's answer, checked: scores and valid [N, C], a column per name in `channels`.

    * A batch that lacks an input of the reward's spec is a RewardError.
    * A sample whose image, video, latents or condition is not finite is invalid; the reward does not get it.
    * Samples that are equal in all that a reward may read are scored once (unless grad, or the reward is groupwise).
    * A non-finite score, or one the reward marks invalid, is NaN with valid False, channel by channel. Components are NaN
      where no channel is valid.
    * An exception (sys.exit too), a write into the batch's tensors, an answer of the wrong form (shape, dtype, channels) or a
      score outside spec.range is a RewardError.
    * More than `max_fail_rate` of the batch invalid in one channel is a RewardError.
    * What the reward changes in the process is put back, see rewards.isolation (not where it is computed elsewhere).

    grad False: no graph, everything on the CPU. grad True: the graph from scores to the inputs is kept, on the reward's device;
    a RewardError if spec.differentiable is False or the reward lost the graph. Sum with
    `torch.where(output.valid, output.scores, 0).sum()`: the NaN of an invalid score then sends no gradient, and samples
    without a valid score get the gradient 0. Not kept: where one channel of a sample is invalid because its own graph
    divides by zero, say, its other channels may lose their gradient too.
    """
    started = time.perf_counter()
    _check_inputs(reward, batch, grad=grad)
    channels, spec, finite = channels_of(reward), reward.spec, _finite_rows(batch)
    # the number of the sample whose score each one gets
    first = torch.arange(len(batch)) if grad or spec.groupwise else first_of_equals(batch)
    kept = first[finite].unique()
    asked = batch if len(kept) == len(batch) else batch.select(kept)
    asked = replace(  # lists that the reward may change
        asked, prompts=list(asked.prompts), metadata=[_copied(row) for row in asked.metadata],
        sample_ids=list(asked.sample_ids), group_ids=list(asked.group_ids),
    )  # fmt: skip
    unscored: list[Tensor] = []  # filled with the rows whose gradient is 0, before any backward
    if grad:
        asked = replace(asked, **_inputs_with_safe_gradients(asked, unscored))
    count, written = len(asked), _versions(asked)
    try:
        with nullcontext() if spec.elsewhere else isolated(reward.name), torch.set_grad_enabled(grad):
            answer = reward(asked) if count else no_answer(0, len(channels))
    except (Exception, SystemExit, GeneratorExit) as error:
        raise RewardError(f"reward {reward.name!r} failed on {count} samples: {_text(error)}") from error
    if changed := [name for name, version in _versions(asked).items() if version != written[name]]:
        raise RewardError(
            f"reward {reward.name!r} wrote into the {' and '.join(changed)} of its batch; expected them unchanged, since others "
            "read them too: clone() before an operation in place"
        )
    answer = _in_columns(reward.name, answer, count, len(channels), grad=grad)
    masked = _masked(answer if grad else _on_cpu(answer))
    unscored.append(~masked.valid.any(1))
    if grad:
        _check_graph(reward.name, asked, masked)
    _check_range(reward, masked)
    output = replace(masked, channels=channels)
    if len(kept) < len(batch):
        output = at_rows(output, torch.searchsorted(kept, first).masked_fill(~finite, -1))
        reasons = zip(output.info, finite.tolist(), strict=True)
        output = replace(output, info=[text if ok else "its input is not finite" for text, ok in reasons])
    check_rate(reward.name, output, batch.prompts, batch.sample_ids, max_fail_rate)
    return replace(output, elapsed=time.perf_counter() - started)


def load(reward: Reward) -> None:
    """The reward's `load`, isolated as `score` is; RewardError if it fails."""
    _run_isolated(reward.name, "load", lambda: reward.load())


def close(reward: Reward) -> None:
    """The reward's `close`, isolated as `score` is; RewardError if it fails."""
    _run_isolated(reward.name, "close", lambda: reward.close())


def _run_isolated(name: str, verb: str, method: Callable[[], None]) -> None:
    try:
        with isolated(name):
            method()
    except (Exception, SystemExit, GeneratorExit) as error:
        raise RewardError(f"reward {name!r} failed to {verb}: {_text(error)}") from error


def check_rate(
    name: str, output: RewardOutput, prompts: list[str], sample_ids: list[int], max_fail_rate: float
) -> None:
    """RewardError if in any channel of a checked answer more than `max_fail_rate` of the samples have no score."""
    for column, channel in zip(output.valid.T, output.channels, strict=True):
        failed = (~column).nonzero().flatten().tolist()
        if len(failed) > max_fail_rate * len(column):
            first, where = failed[0], "" if len(output.channels) == 1 else f" in channel {channel!r}"
            raise RewardError(
                f"reward {name!r}: {len(failed)} of {len(column)} samples have no score{where}, more than max_fail_rate "
                f"{max_fail_rate:g} allows. The first, sample {sample_ids[first]} "
                f"(prompt {prompts[first]!r}): {output.info[first] or 'no reason given'}"
            )


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _versions(batch: RewardBatch) -> dict[str, int]:
    """How often the tensors of each field of the batch have been written to; inference tensors do not count that."""
    fields = {name: [] if tensor is None else [tensor] for name, tensor in batch.tensors().items()}
    fields["conditions"] = [image for images in batch.conditions or [] for image in images]
    return {
        name: sum(tensor._version for tensor in tensors if not tensor.is_inference())
        for name, tensors in fields.items()
    }


def _copied(value: Any) -> Any:
    """Metadata with its own lists and mappings, to any depth; what else they hold is shared."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _check_inputs(reward: Reward, batch: RewardBatch, *, grad: bool) -> None:
    spec, given = spec_of(reward), vars(batch)
    lacks = [name for name in spec.inputs if given[name] is None]
    if lacks:
        has = [name for name in get_args(Input) if given[name] is not None]
        raise RewardError(
            f"reward {reward.name!r}: got a batch with {' and '.join(has) or 'prompts only'}; expected "
            f"{' and '.join(lacks)}, which it reads: take a reward for what the policy makes, and for conditions prompts with an 'image'"
        )
    if grad and not spec.differentiable:
        raise RewardError(
            f"reward {reward.name!r}: got grad=True; expected a differentiable reward, which this is not (its "
            "spec.differentiable is False): take another reward, or train without its gradient"
        )


def _finite_rows(batch: RewardBatch) -> Tensor:
    """bool [N] on the CPU: the samples whose images, videos, latents and conditions are finite everywhere."""
    finite = torch.ones(len(batch), dtype=torch.bool)
    for tensor in batch.tensors().values():
        if tensor is not None:
            finite &= torch.isfinite(tensor.detach()).flatten(1).all(dim=1).cpu() if tensor.ndim > 1 else True
    for row, images in enumerate(batch.conditions or []):
        finite[row] &= all(bool(torch.isfinite(image).all()) for image in images)
    return finite


def _inputs_with_safe_gradients(batch: RewardBatch, unscored: list[Tensor]) -> dict[str, Any]:
    """The batch's tensors that need gradients, as views whose gradient is 0 in the rows `unscored[0]` [N].

    The graph of a score that is not finite may send NaN back even where the loss leaves that score out (0 · inf)."""
    views = {}
    for name, tensor in batch.tensors().items():
        if tensor is None or not tensor.requires_grad:
            continue
        view = tensor.view_as(tensor)

        def safe(gradient: Tensor) -> Tensor:
            rows = unscored[0].to(gradient.device).reshape(-1, *[1] * (gradient.ndim - 1))
            return torch.where(rows, torch.zeros_like(gradient), gradient)

        view.register_hook(safe)
        views[name] = view
    return views


def _in_columns(name: str, answer: RewardOutput, count: int, channels: int, *, grad: bool) -> RewardOutput:
    """The answer with scores, valid and uncertainty as [N, C]; RewardError if its form is wrong."""
    if not isinstance(answer, RewardOutput):
        raise RewardError(f"got {type(answer).__name__} from reward {name!r}; expected a RewardOutput")
    shapes = [(count, channels)] if channels > 1 else [(count,), (count, 1)]
    numbers = (torch.float32, torch.float64) if grad else (torch.float32,)
    columns = {"scores": (answer.scores, numbers), "valid": (answer.valid, (torch.bool,))}
    if answer.uncertainty is not None:
        columns["uncertainty"] = (answer.uncertainty, numbers)
    parts = {f"components[{key!r}]": (part, numbers) for key, part in answer.components.items()}
    for key, (part, dtypes) in (columns | parts).items():
        allowed = shapes if key in columns else [(count,)]
        if not isinstance(part, Tensor):
            raise RewardError(f"reward {name!r}: {key} is {type(part).__name__}; expected a tensor")
        if tuple(part.shape) not in allowed:
            what = f"one per sample and channel of its spec ({channels})" if key in columns else "one per sample"
            raise RewardError(
                f"reward {name!r}: {key} has shape {list(part.shape)}; expected {list(allowed[0])}, {what}"
            )
        if part.dtype not in dtypes:
            raise RewardError(f"reward {name!r}: {key} is {part.dtype}; expected {dtypes[0]}")
    if answer.info and len(answer.info) != count:
        raise RewardError(f"reward {name!r}: info has {len(answer.info)} entries for {count} samples; one per sample")
    uncertainty = answer.uncertainty
    return replace(
        answer,
        scores=answer.scores.reshape(count, channels),
        valid=answer.valid.reshape(count, channels),
        uncertainty=None if uncertainty is None else uncertainty.reshape(count, channels),
    )


def _on_cpu(answer: RewardOutput) -> RewardOutput:
    """The answer without a graph, on the CPU."""
    uncertainty = answer.uncertainty
    return replace(
        answer,
        scores=answer.scores.detach().cpu(),
        valid=answer.valid.cpu(),
        components={name: part.detach().cpu() for name, part in answer.components.items()},
        uncertainty=None if uncertainty is None else uncertainty.detach().cpu(),
    )


def _masked(answer: RewardOutput) -> RewardOutput:
    """With NaN wherever there is no score, so that no number can be used by mistake."""
    scores, claimed = answer.scores, answer.valid.to(answer.scores.device)
    valid = claimed & torch.isfinite(scores.detach())
    info = list(answer.info) or [""] * len(scores)
    for row, column in (claimed & ~valid).nonzero().tolist():
        info[row] = f"the score is {scores[row, column].item()}; {info[row]}".removesuffix("; ")
    no_score, uncertainty = ~valid.any(1), answer.uncertainty
    return RewardOutput(
        scores.masked_fill(~valid, torch.nan),
        valid,
        {
            name: part.detach().masked_fill(no_score.to(part.device), torch.nan)
            for name, part in answer.components.items()
        },
        info,
        uncertainty=None if uncertainty is None else uncertainty.detach().masked_fill(~valid, torch.nan),
    )


def _check_graph(name: str, asked: RewardBatch, answer: RewardOutput) -> None:
    wanted = any(tensor is not None and tensor.requires_grad for tensor in asked.tensors().values())
    if wanted and len(answer.scores) and not answer.scores.requires_grad:
        raise RewardError(
            f"reward {name!r}: got scores without a graph; expected one to the inputs, which its spec promises "
            "(differentiable): let it not detach, round or convert to numpy"
        )


def _check_range(reward: Reward, answer: RewardOutput) -> None:
    """RewardError for a score outside the range of the reward's spec (by more than rounding), or a negative uncertainty."""
    if answer.uncertainty is not None and bool((answer.uncertainty < 0).any()):
        raise RewardError(f"reward {reward.name!r}: got a negative uncertainty; expected at least 0")
    if reward.spec.range is None or not bool(answer.valid.any()):
        return
    low, high = reward.spec.range
    found = answer.scores.detach()[answer.valid]
    least, most = float(found.min()), float(found.max())
    slack = 1e-5 * max([1.0, *(abs(bound) for bound in (low, high) if math.isfinite(bound))])  # rounding in fp32
    if least < low - slack or most > high + slack:
        raise RewardError(
            f"reward {reward.name!r}: got scores from {least:g} to {most:g}; expected {low:g} to {high:g}, the range of its "
            "spec: mend the reward, or its spec"
        )
