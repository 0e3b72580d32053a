"""What rewards that are made of others share: the parts' specs as one, and their answers on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, get_args

import torch
from torch import Tensor

from rewards.answers import at_rows, cat
from rewards.base import Input, Memory, Reward, RewardBatch, RewardOutput, RewardSpec, channels_of, spec_of
from rewards.guard import score


def check_names(what: str, parts: Sequence[Reward]) -> None:
    """ValueError without a part, or if two parts have one name."""
    names = [part.name for part in parts]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"got {what} of rewards {names}; expected at least one, and different names: set `name` on the equal ones"
        )


def check_one_channel(what: str, parts: Sequence[Reward]) -> None:
    """ValueError for a part of several channels."""
    for part in parts:
        if len(channels := channels_of(part)) > 1:
            raise ValueError(
                f"got {what} with reward {part.name!r}, whose channels are {list(channels)}; expected one score "
                "per part: take rewards.Channels, and mix advantages (flowalign.advantage.Mixed)"
            )


def joint_spec(what: str, parts: Sequence[Reward], channels: tuple[str, ...] = ()) -> RewardSpec:
    """The spec of all parts together: all their inputs; differentiable, elsewhere and scores_black if all are; groupwise if
    one is; the memory of the largest.

    ValueError for parts of two scopes, or of completions that differ."""
    specs = [spec_of(part) for part in parts]
    scopes = {part.name: (s.scope, s.completion_steps, s.max_sigma) for part, s in zip(parts, specs, strict=True)}
    if len(set(scopes.values())) > 1:
        raise ValueError(
            f"got {what} with the scopes {scopes} (scope, completion_steps, max_sigma); expected one: put rewards of states "
            "under process_rewards"
        )
    return RewardSpec(
        inputs=tuple(name for name in get_args(Input) if any(name in spec.inputs for spec in specs)),
        scope=specs[0].scope,
        completion_steps=specs[0].completion_steps,
        max_sigma=specs[0].max_sigma,
        groupwise=any(spec.groupwise for spec in specs),
        elsewhere=all(spec.elsewhere for spec in specs),
        channels=channels,
        differentiable=all(spec.differentiable for spec in specs),
        scores_black=all(spec.scores_black for spec in specs),
        licence="; ".join(dict.fromkeys(spec.licence for spec in specs if spec.licence)),
        checkpoint="; ".join(dict.fromkeys(spec.checkpoint for spec in specs if spec.checkpoint)),
        memory=max((spec.memory for spec in specs), key=get_args(Memory).index),
    )


class HasParts(Protocol):
    @property
    def rewards(self) -> list[Reward]: ...


def load_parts(reward: HasParts) -> None:
    """The `load` of a reward made of others."""
    for part in reward.rewards:
        part.load()


def close_parts(reward: HasParts) -> None:
    """The `close` of a reward made of others."""
    for part in reward.rewards:
        part.close()


def ask(
    parts: Sequence[Reward], batch: RewardBatch, *, grad: bool
) -> tuple[list[RewardOutput], dict[str, Tensor], list[str]]:
    """Each part's checked answer, the parts' components as `part/component`, and what they say of each sample.

    How many may fail is left to the caller's own `score`."""
    outputs: list[RewardOutput] = []
    components: dict[str, Tensor] = {}
    info = [""] * len(batch)
    for part in parts:
        output = score(part, batch, grad=grad, max_fail_rate=1.0)
        outputs.append(output)
        components |= {f"{part.name}/{key}": value for key, value in output.components.items()}
        info = [f"{text}; {part.name}: {more}" if more else text for text, more in zip(info, output.info, strict=True)]
    return outputs, components, [text.removeprefix("; ") for text in info]


def columns(outputs: Sequence[RewardOutput]) -> tuple[Tensor, Tensor]:
    """Answers of K rewards of one channel as scores [N, K], NaN where invalid, and uncertainties [N, K], 0 where none is stated."""
    like = outputs[0].scores
    scores = torch.cat([output.scores.to(like) for output in outputs], 1)
    doubts = [torch.zeros_like(o.scores) if o.uncertainty is None else o.uncertainty for o in outputs]
    return scores, torch.cat([doubt.to(like) for doubt in doubts], 1)


def with_raw(output: RewardOutput) -> dict[str, Tensor]:
    """The components of a part, with its scores as `raw` (`raw/channel`), for a reward that changes them."""
    names = ("raw",) if len(output.channels) == 1 else tuple(f"raw/{channel}" for channel in output.channels)
    return output.components | dict(zip(names, output.scores.detach().float().T, strict=True))


def wants_gradient(spec: RewardSpec) -> bool:
    """Whether the caller of a composed reward asked for gradients (`score` switches them on for its call)."""
    return torch.is_grad_enabled() and spec.differentiable


def spec_elsewhere(reward: Reward) -> RewardSpec:
    """The spec of a reward that lives in another process."""
    return replace(spec_of(reward), differentiable=False, elsewhere=True)


def in_chunks(
    call: Callable[[RewardBatch], RewardOutput], batch: RewardBatch, size: int | None, *, groupwise: bool
) -> RewardOutput:
    """`call` on chunks of at most `size` samples (see `rows_of_chunks`), as one answer in the order of the batch."""
    chunks = rows_of_chunks(batch.group_ids, size, groupwise=groupwise)
    if len(chunks) == 1:
        return call(batch)
    output = cat([call(batch.select(rows)) for rows in chunks])
    return at_rows(output, torch.tensor([row for rows in chunks for row in rows]).argsort())


def rows_of_chunks(group_ids: Sequence[int], size: int | None, *, groupwise: bool) -> list[list[int]]:
    """The samples 0..N-1 in chunks of at most `size` (None: all at once); at least one chunk, which may be empty.

    groupwise: whole groups, in the order in which they begin, as many as fit into a chunk, and at least one."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        members.setdefault(group if groupwise else row, []).append(row)
    chunks: list[list[int]] = [[]]
    for rows in members.values():
        if size is not None and chunks[-1] and len(chunks[-1]) + len(rows) > size:
            chunks.append([])
        chunks[-1] += rows
    return chunks
