"""Roots that another role rolls out, or the policy with a hint in its prompt: which weights, which condition, which calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.models.base import Policy
from flowalign.rollouts.task import Rollout
from samplers import SOURCES, Rows, Tree, Velocity, send


def roles_of(settings: Rollout, tree: Tree) -> dict[int, str]:
    """The role that rolls out each source in `tree`, by its number in SOURCES; {0: "policy"} for a plan without Sourced.

    ValueError for a teacher's samples without a role, and for hinted ones without a hint."""
    used = {SOURCES[number] for number in tree.source.unique().tolist()}
    roles = {"student": "policy", "hinted": "policy", **settings.sources}
    if used - roles.keys() or ("hinted" in used and settings.hint_key is None):
        raise ValueError(
            f"got a rollout.plan with samples of {sorted(used)}, rollout.sources={settings.sources} and "
            f"rollout.hint_key={settings.hint_key!r}; expected a role for the teacher, rollout.sources={{teacher: NAME}} with "
            "NAME one of policy.roles, and a hint_key for hinted samples: name them, or set hinted=0, teacher=0"
        )
    return {SOURCES.index(name): roles[name] for name in used}


def check_sources(settings: Rollout, tree: Tree, known: Collection[str], records: Sequence[PromptRecord]) -> None:
    """ValueError, before a model is loaded, for what `roles_of` refuses, for roles that the policy will not have (`known`),
    for settings that would do nothing, and for prompts without a hint."""
    roles = roles_of(settings, tree)
    idle = settings.sources.keys() - {SOURCES[number] for number in roles if number}
    if idle or (settings.hint_key is not None and SOURCES.index("hinted") not in roles):
        raise ValueError(
            f"got rollout.sources={settings.sources}, rollout.hint_key={settings.hint_key!r} and a rollout.plan with samples of "
            f"{sorted(SOURCES[number] for number in roles)}; expected only what the plan has: set hinted or teacher of "
            "samplers.Sourced, or leave these out"
        )
    missing = sorted(set(roles.values()) - set(known))
    if missing:
        raise ValueError(
            f"got rollout.sources={settings.sources}; expected roles among {sorted(known)}: add {missing} to policy.roles"
        )
    if settings.hint_key is not None:
        for record in records:
            hinted(record, settings.hint_key)


def hinted(record: PromptRecord, key: str) -> PromptRecord:
    """The record with the hinted prompt of its metadata. ValueError if it has none."""
    hint = record.metadata.get(key)
    if not isinstance(hint, str) or not hint.strip():
        raise ValueError(
            f"got {hint!r} under {key!r} of prompt {record.uid} ({record.prompt!r}); expected the prompt with its hint, a text: "
            "rollout.hint_key names a key of every row of `prompts`"
        )
    return replace(record, prompt=hint)


def by_source(velocity: Velocity, policy: Policy, tree: Tree, roles: Mapping[int, str], micro_batch: int) -> Velocity:
    """`velocity` with the rows of each source under its role. Each role is entered once per call, and calls the network
    with at most `micro_batch` rows at a time; so let `rollout` pass whole generations (micro_batch=None)."""

    def routed(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        out, source = torch.empty_like(x), tree.source[root]
        for number, role in sorted(roles.items()):
            mine = (source == number).nonzero().flatten()
            with policy.role(role):
                for rows in Rows(mine, *send(x.device, mine)).split(micro_batch):
                    out[rows.there] = velocity(rows.of(x), rows.of(sigma), root[rows.numbers]).to(out)
        return out

    return routed
