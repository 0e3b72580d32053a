"""`score`: every caller asks a reward through it, so that a failure never becomes a number. `close` ends one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, channels_of, spec_of
from rewards.isolation import isolated


def score(reward: Reward, batch: RewardBatch, *, grad: bool = False, max_fail_rate: float = 0.5) -> RewardOutput:
    """The reward's answer, checked: scores and valid [N, C], a column per name in `channels`.

    * A batch that lacks an input of the reward's spec is a RewardError.
    * A sample whose image, video, latents or condition is not finite is invalid; the reward does not get it.
    * A non-finite score, or one the reward marks invalid, is NaN with valid False, channel by channel. Components are NaN
      where no channel is valid.
    * An exception (sys.exit too), a write into the batch's tensors, an answer of the wrong form (shape, dtype, channels) or a score outside spec.range is a RewardError.
    * More than `max_fail_rate` of the batch invalid in one channel is a RewardError.
    * What the reward changes in the process is put back, see rewards.isolation.

    grad False: no graph, everything on the CPU. grad True: the graph from scores to the inputs is kept, on the reward's device;
    a RewardError if spec.differentiable is False or the reward lost the graph. Sum with
    `torch.where(output.valid, output.scores, 0).sum()`: the NaN of an invalid score then sends no gradient, and samples
    without a valid score get the gradient 0. Not kept: where one channel of a sample is invalid because its own graph
    divides by zero, say, its other channels may lose their gradient too.
    """
    started = time.perf_counter()
    _check_inputs(reward, batch, grad=grad)
    channels, finite = channels_of(reward), _finite_rows(batch)
    asked = batch if bool(finite.all()) else batch.select(finite)
    asked = replace(
        asked, prompts=list(asked.prompts), metadata=[{**row} for row in asked.metadata]
    )  # for it to change
    unscored: list[Tensor] = []  # filled with the rows whose gradient is 0, before any backward
    if grad:
        asked = replace(asked, **_inputs_with_safe_gradients(asked, unscored))
    count, written = len(asked), _versions(asked)
    try:
        with isolated(reward.name), torch.set_grad_enabled(grad):
            answer = reward(asked) if count else _nothing(0, len(channels))
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
    output = replace(_to_all_rows(masked, finite), channels=channels)
    check_rate(reward.name, output, batch.prompts, batch.sample_ids, max_fail_rate)
    return replace(output, elapsed=time.perf_counter() - started)


def load(reward: Reward) -> None:
    """The reward's `load`, isolated as `score` is; RewardError if it fails."""
    try:
        with isolated(reward.name):
            reward.load()
    except (Exception, SystemExit, GeneratorExit) as error:
        raise RewardError(f"reward {reward.name!r} failed to load: {_text(error)}") from error


def close(reward: Reward) -> None:
    """The reward's `close`, isolated as `score` is; RewardError if it fails."""
    try:
        with isolated(reward.name):
            reward.close()
    except (Exception, SystemExit, GeneratorExit) as error:
        raise RewardError(f"reward {reward.name!r} failed to close: {_text(error)}") from error


def score_chunks(reward: Reward, chunks: Iterable[RewardBatch], *, max_fail_rate: float = 0.5) -> RewardOutput:
    """The answers on consecutive parts of a batch as one, without gradients; each part is freed before the next is made.

    How many may fail is judged over all parts. elapsed: seconds of scoring, without those in which `chunks` made its parts.
    """
    outputs: list[RewardOutput] = []
    prompts: list[str] = []
    samples: list[int] = []
    for chunk in chunks:
        outputs.append(score(reward, chunk, max_fail_rate=1.0))
        prompts += chunk.prompts
        samples += chunk.sample_ids
        del chunk  # else it would live until the next one is made
    output = cat(outputs or [replace(_nothing(0, len(channels_of(reward))), channels=channels_of(reward))])
    check_rate(reward.name, output, prompts, samples, max_fail_rate)
    return output


def cat(outputs: list[RewardOutput]) -> RewardOutput:
    """The checked answers of one reward on consecutive parts of a batch (at least one) as its answer on all of it.

    A component, or the uncertainty, that some parts lack is NaN there."""
    names = sorted({name for output in outputs for name in output.components})

    def joined(parts: list[Tensor | None], like: list[Tensor]) -> Tensor:
        filled = [
            torch.full_like(own, torch.nan) if part is None else part for part, own in zip(parts, like, strict=True)
        ]
        return torch.cat(filled)

    scores, one = (
        [output.scores for output in outputs],
        [output.scores.new_empty(len(output.scores)) for output in outputs],
    )
    uncertain = [output.uncertainty for output in outputs]
    return RewardOutput(
        torch.cat(scores),
        torch.cat([output.valid for output in outputs]),
        {name: joined([output.components.get(name) for output in outputs], one) for name in names},
        [text for output in outputs for text in output.info],
        sum(output.elapsed for output in outputs),
        None if all(part is None for part in uncertain) else joined(uncertain, scores),
        outputs[0].channels,
    )


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
    """How often each tensor of the batch has been written to; inference tensors do not count that."""
    return {
        name: tensor._version
        for name, tensor in batch.tensors().items()
        if tensor is not None and not tensor.is_inference()
    }


def _check_inputs(reward: Reward, batch: RewardBatch, *, grad: bool) -> None:
    spec, given = spec_of(reward), batch.tensors()
    lacks = [name for name in spec.inputs if given[name] is None]
    if lacks:
        has = [name for name in ("images", "videos", "latents") if given[name] is not None]
        raise RewardError(
            f"reward {reward.name!r}: got a batch with {' and '.join(has) or 'prompts only'}; expected "
            f"{' and '.join(lacks)}, which it reads: take a reward for what the policy makes"
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


def _to_all_rows(output: RewardOutput, finite: Tensor) -> RewardOutput:
    """The answer on the `finite` [N] samples as one on all N; the others are invalid."""
    if bool(finite.all()):
        return output
    rows, scores = finite.nonzero().flatten(), output.scores

    def on_all(part: Tensor) -> Tensor:
        empty = part.new_zeros if part.dtype == torch.bool else lambda shape: part.new_full(shape, torch.nan)
        return empty((len(finite), *part.shape[1:])).index_copy(0, rows.to(part.device), part)

    what = "its input is not finite"
    info = [what] * len(finite)
    for row, text in zip(rows.tolist(), output.info, strict=True):
        info[row] = text
    return RewardOutput(
        on_all(scores),
        on_all(output.valid),
        {name: on_all(part) for name, part in output.components.items()},
        info,
        uncertainty=None if output.uncertainty is None else on_all(output.uncertainty),
    )


def _nothing(count: int, channels: int) -> RewardOutput:
    return RewardOutput(torch.full((count, channels), torch.nan), torch.zeros(count, channels, dtype=torch.bool))
