"""A baseline that another comparison has run: its records are read and checked, and it is not run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.compare.plan import Plan, evaluation_differences
from flowalign.compare.record import Record, record_of
from flowalign.config import load_config
from flowalign.data import load_prompts
from flowalign.errors import ConfigError
from flowalign.storage.files import read_json
from rewards import labels_of

SAME_BASE = 0.1  # mean difference of two evaluations of the base by prompt, in standard deviations over the prompts


def former_records(plan: Plan) -> list[Record]:
    """The runs of the baseline that is a method of other results; [] where the comparison runs its own.

    ConfigError unless they were evaluated on the same prompts, by the same first reward and with the same settings, as their own
    configurations say: further rewards may differ."""
    comparison = plan.comparison
    if comparison.former is None or comparison.baseline is None:
        return []
    found = _recorded(comparison.former, comparison.baseline)
    first = next(iter(comparison.methods.values()))
    ours, plain = load_config(first.files, first.overrides)
    place = f"baseline {comparison.baseline} of {comparison.former}"
    for record in found:
        try:
            theirs = load_config(record.files, record.overrides)[1]
        except ConfigError as error:
            raise ConfigError(f"{place}: its configuration no longer loads: {error}") from error
        for key, (own, other) in evaluation_differences(_first_reward(plain), _first_reward(theirs)).items():
            raise ConfigError(
                f"{place} is evaluated differently: {key} is {own!r} here and {other!r} there; expected the same"
            )
    settings = ours.evaluation
    uids = tuple(record.uid for record in load_prompts(settings.prompts)[: settings.count])
    reward = labels_of(settings.rewards[0])[0]
    if (found[0].prompts, found[0].reward) != (uids, reward):
        raise ConfigError(
            f"{place} holds {found[0].reward} on {len(found[0].prompts)} prompts; expected {reward} on the {len(uids)} prompts of "
            f"{settings.prompts}, with the same uids"
        )
    return found


def check_same_base(former: Sequence[Record], records: Sequence[Record]) -> None:
    """ConfigError where the base model scored otherwise in the former records: other weights, noise or reward software. A few
    prompts may, since machines round differently."""
    one, other = (np.mean([record.curve[0].scores for record in each], 0) for each in (former, records))
    apart, spread = np.nanmean(np.abs(one - other)), np.nanstd(one)
    if apart > SAME_BASE * spread:
        raise ConfigError(
            f"the base model's {former[0].reward} is {np.nanmean(one):.4f} in the runs of {former[0].method} and "
            f"{np.nanmean(other):.4f} here, by prompt {apart:.3g} apart on average; expected the same base, noise and reward: run the "
            "baseline again"
        )


def _first_reward(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the first reward of its evaluation alone."""
    return {**plain, "evaluation": {**plain["evaluation"], "rewards": plain["evaluation"]["rewards"][:1]}}


def _recorded(results: Path, method: str) -> list[Record]:
    """Its records beside the results, those that the results are made of. ConfigError without them."""
    known = read_json(results).get("methods")
    if not isinstance(known, dict):
        raise ConfigError(f"got baseline.results={str(results)!r}; expected the .json of a comparison")
    if method not in known:
        raise ConfigError(
            f"got baseline.method={method!r}; expected one of {', '.join(known)}, the methods of {results}"
        )
    folder, seeds = results.with_suffix(""), known[method]["seeds"]
    found: dict[str, list[Record]] = {}
    for seed in seeds:
        for path in sorted(folder.glob(f"{method}-*-s{seed}.json")):
            found.setdefault(path.stem.removesuffix(f"-s{seed}"), []).append(record_of(path, (method, seed)))
    complete = [records for records in found.values() if len(records) == len(seeds) and _is_of(records, known[method])]
    if not complete:
        raise ConfigError(
            f"{folder} lacks the records of {method}, seeds {seeds}, of which {results} is made: restore them"
        )
    return complete[0]


def _is_of(records: Sequence[Record], row: dict[str, Any]) -> bool:
    """Whether the results' row of the method is made of these records; there may be others, of another budget."""
    return abs(np.mean([record.totals["evaluations"] for record in records]) - row["evaluations"]) < 1
