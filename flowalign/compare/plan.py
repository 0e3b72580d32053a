"""The runs of a comparison: which folder, which record, which command, and what of it is done."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.compare.spec import Budget, Comparison
from flowalign.config import load_config
from flowalign.config.load import as_written
from flowalign.errors import ConfigError
from flowalign.run.folder import MAY_CHANGE, differences
from flowalign.storage.files import read_json

# of the run, what its result does not depend on
NO_MATTER = re.compile(
    r"run\.(name|seed|output|project|resume|gradient_check|checkpoint_every|keep_checkpoints|trackers|tags)(\..*)?"
)
# an override of the comparison or of a method says otherwise; what its files say, and the default, are of another length
UNTIL_BUDGET = "run.iterations=1000000"
# of the evaluation, what may differ between methods
FREE = re.compile(r"every|batch_size|training_reward|allow_training_prompts|rewards\..*(workers|timeout)")


@dataclass(frozen=True)
class Planned:
    """One run. config_hash: of the complete configuration as it is written, less its seed, and name, output and the like: a
    parameter that a class gets later changes nothing. folder: keyed by what a run folder is tied to, so that a larger budget
    goes on where a smaller one ended. record: the JSON of its result."""

    method: str
    seed: int
    budget: Budget
    config_hash: str
    folder: Path
    record: Path
    files: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """All overrides of the run: its budget ends it, unless they name run.iterations."""
        own = [f"run.name={self.folder.name}", f"run.output={self.folder.parent}", f"run.seed={self.seed}"]
        return [UNTIL_BUDGET, *self.overrides, *own, self.budget.override]

    @property
    def command(self) -> list[str]:
        """Of a child process."""
        return [sys.executable, "-m", "flowalign.cli", "train", *self.files, *self.settings]


@dataclass(frozen=True)
class Plan:
    """A comparison whose configurations are known to be good. written: that of each method as data, without defaults."""

    comparison: Comparison
    written: Mapping[str, dict[str, Any]]

    @staticmethod
    def of(comparison: Comparison) -> Plan:
        """Reads every configuration; no model is loaded. ConfigError naming the method whose configuration is wrong, or which
        is evaluated otherwise than the first."""
        plains = {}
        for name, method in comparison.methods.items():
            try:
                plains[name] = load_config(method.files, [*method.overrides, f"run.name={name}"])[1]
            except ConfigError as error:
                raise ConfigError(f"method {name!r}: {error}") from error
        first = next(iter(plains))
        for name, plain in plains.items():
            if others := evaluation_differences(plains[first], plain):
                key, (ours, other) = next(iter(others.items()))
                raise ConfigError(
                    f"methods {first!r} and {name!r} differ in evaluation: {key} is {ours!r} and {other!r}; expected one base "
                    "and one evaluation for all: set it in the overrides of the comparison"
                )
        methods = comparison.methods.items()
        return Plan(comparison, {name: as_written(method.files, method.overrides) for name, method in methods})

    def runs(self, name: str, budget: Budget) -> list[Planned]:
        """The runs of a method, one per seed."""
        method = self.comparison.methods[name]
        values = _flat(self.written[name]) | {f"run.max_{budget.unit}": budget.override}
        tied = {key: value for key, value in values.items() if not MAY_CHANGE.fullmatch(key)}
        config_hash, folder_hash = _hash(values), _hash(tied)
        return [
            Planned(
                name, seed, budget, config_hash,
                self.comparison.output.absolute() / f"{name}-{folder_hash}-s{seed}",
                self.comparison.results / self.comparison.name / f"{name}-{config_hash}-s{seed}.json",
                method.files, method.overrides,
            )
            for seed in method.seeds
        ]  # fmt: skip


def evaluation_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two complete configurations are evaluated differently: {dotted key: both values}, without what changes no score."""
    changed = differences(one["evaluation"], other["evaluation"])
    others = {key: values for key, values in changed.items() if not FREE.fullmatch(key)}
    paths = (one["policy"]["path"], other["policy"]["path"])
    return others if paths[0] == paths[1] else {**others, "policy.path": paths}


def has_own_budget(comparison: Comparison, name: str) -> bool:
    """Whether the budget of a method is known without the baseline's total."""
    return comparison.baseline in (None, name) or comparison.methods[name].budget is not None


def budget_of(comparison: Comparison, name: str, denominator: Mapping[str, float] | None) -> Budget:
    """What a run of the method may cost. denominator: the baseline's totals, needed where the budget is a share of them."""
    method, baseline = comparison.methods[name], comparison.baseline
    if method.budget is not None:
        return method.budget
    if baseline in (None, name) or denominator is None:
        assert comparison.budget is not None  # checked by the specification
        return comparison.budget
    unit = "evaluations"  # of other results the seconds are those of another day
    if comparison.former is None:
        given = comparison.methods[str(baseline)].budget or comparison.budget
        assert given is not None
        unit = given.unit
    return Budget(unit, max(1.0, round(comparison.share * denominator[unit])))


def is_done(run: Planned) -> bool:
    return run.record.exists()


def former_record(run: Planned) -> Path | None:
    """A record of the same method, seed, files and overrides under another hash: something in the files has changed."""
    for path in sorted(run.record.parent.glob(f"{run.method}-*-s{run.seed}.json")):
        content = read_json(path)
        if (content.get("method"), content.get("overrides")) == (run.method, [*run.overrides, run.budget.override]):
            return path
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nest of dicts and lists."""
    if isinstance(value, list):
        value = dict(enumerate(value)) or value
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: each for key, inner in value.items() for name, each in _flat(inner, f"{prefix}.{key}".strip(".")).items()
    }


def _hash(values: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if not NO_MATTER.fullmatch(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]
