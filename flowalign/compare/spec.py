"""What is compared: a YAML file, or files on the command line, as typed objects. Nothing is loaded here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowalign.config.layers import read_layer
from flowalign.errors import ConfigError

KEYS = ("methods", "files", "overrides", "seeds", "budget", "baseline", "share", "references", "output", "results")
BASELINE_KEYS = ("results", "method")
METHOD_KEYS = ("files", "overrides", "seeds", "budget", "apart", "guided")
OWN = re.compile(r"run\.(name|seed|output|max_evaluations|max_seconds)=.*", re.DOTALL)  # set by the comparison


@dataclass(frozen=True)
class Budget:
    """What one run may cost: `evaluations` (in `summary.evaluation_unit`) or `seconds` of its iterations."""

    unit: str
    amount: float

    @property
    def override(self) -> str:
        """The setting of the run."""
        amount = int(self.amount) if self.unit == "evaluations" else self.amount
        return f"run.max_{self.unit}={amount}"


@dataclass(frozen=True)
class Method:
    """A configuration by its files and overrides, those of the comparison included. budget: its own, if it has one. apart:
    listed apart and never the best; guided: so, because its rollout or teacher is guided."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget | None = None
    apart: bool = False
    guided: bool = False


@dataclass(frozen=True)
class Comparison:
    """Methods by name. baseline: the one whose final mean is the target and whose total is the denominator; the others get
    `share` of that total unless they have a budget. budget: of the baseline; without one, of every method. former: the results of
    another comparison, of which the baseline is a method that is not run again; None: it is one of `methods`.

    references: further scores to show, such as the base at its best guidance. output: where run folders go. results: where
    the results go, under the name of the comparison. command: what rebuilds them."""

    name: str
    methods: Mapping[str, Method]
    budget: Budget | None
    baseline: str | None = None
    former: Path | None = None
    share: float = 1.0
    references: Mapping[str, float] = field(default_factory=dict)
    output: Path = Path("runs/compare")
    results: Path = Path("results")
    command: str = ""


def read_spec(path: str) -> Comparison:
    """A YAML file. ConfigError naming the key and its value for what cannot be one."""
    spec = yaml.safe_load(yaml.serialize(read_layer(path)))
    try:
        return _comparison(Path(path).stem, spec, f"flowalign compare {path}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def of_files(
    methods: Sequence[str], shared: Sequence[str], overrides: Sequence[str], seeds: Sequence[int],
    budget: dict[str, float], baseline: str | None, command: str,
) -> Comparison:  # fmt: skip
    """A comparison without a file of its own: every one of `methods` is a configuration file, named by its stem."""
    names = [Path(path).stem for path in methods]
    if len(set(names)) < len(names):
        raise ConfigError(f"got methods {', '.join(names)}; expected files of different names")
    spec: dict[str, Any] = {
        "methods": {name: {"files": [path]} for name, path in zip(names, methods, strict=True)},
        "files": list(shared), "overrides": list(overrides), "seeds": list(seeds), "budget": budget or None,
    }  # fmt: skip
    return _comparison("-".join(names)[:80], spec | ({"baseline": baseline} if baseline else {}), command)


def _comparison(name: str, spec: dict[str, Any], command: str) -> Comparison:
    _check_keys("the comparison", spec, KEYS, ("methods", "seeds"))
    shared = [_strings(spec, key, "") for key in ("files", "overrides")]
    seeds, share = _seeds(spec, ""), spec.get("share")
    if not isinstance(spec["methods"], dict) or not spec["methods"]:
        raise ConfigError(f"got methods={spec['methods']!r}; expected name: {{files: […]}} of at least one")
    methods = {str(key): _method(str(key), value, shared, seeds) for key, value in spec["methods"].items()}
    budget = _budget(spec, "")
    baseline, former = _baseline(spec, methods)
    _check_budgets(spec, methods, budget, baseline, former)
    references = spec.get("references") or {}
    if not isinstance(references, dict) or not all(_is_number(value) for value in references.values()):
        raise ConfigError(f"got references={references!r}; expected name: score")
    return Comparison(
        name, methods, budget, baseline, former, 1.0 if share is None else float(share), references,
        _folder(spec, "output", "runs/compare") / name, _folder(spec, "results", "results"), command,
    )  # fmt: skip


def _method(name: str, value: Any, shared: Sequence[Sequence[str]], seeds: tuple[int, ...]) -> Method:
    place = f"methods.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"got the method {name!r}; expected letters, digits, '.', '_' and '-', it names folders")
    if not isinstance(value, dict):
        raise ConfigError(f"got {place}={value!r}; expected a mapping with files")
    _check_keys(place, value, METHOD_KEYS, ("files",))
    for key in ("apart", "guided"):
        if not isinstance(value.get(key, False), bool):
            raise ConfigError(f"got {place}.{key}={value[key]!r}; expected true or false")
    guided = value.get("guided", False)
    return Method(
        (*_strings(value, "files", place), *shared[0]), (*shared[1], *_strings(value, "overrides", place)),
        _seeds(value, place) if "seeds" in value else seeds, _budget(value, place), value.get("apart", False) or guided, guided,
    )  # fmt: skip


def _check_keys(place: str, given: Mapping[Any, Any], known: Sequence[str], needed: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{place} has no key {key!r}: {hint}Expected {', '.join(known)}")
    for key in needed:
        if key not in given:
            raise ConfigError(f"{place} lacks {key!r}; expected {', '.join(needed)} at least")


def _baseline(spec: Mapping[str, Any], methods: Mapping[str, Method]) -> tuple[str | None, Path | None]:
    """Its name, and the results of another comparison if it is a method of that."""
    value = spec.get("baseline")
    if not isinstance(value, dict):
        if value is not None and value not in list(methods):
            raise ConfigError(
                f"got baseline={value!r}; expected one of the methods {', '.join(methods)}, or {{results: FILE.json, method: NAME}} of "
                "another comparison"
            )
        return value, None
    _check_keys("baseline", value, BASELINE_KEYS, BASELINE_KEYS)
    for key in BASELINE_KEYS:
        if not isinstance(value[key], str) or not value[key]:
            raise ConfigError(f"got baseline.{key}={value[key]!r}; expected a text")
    if value["method"] in methods:
        raise ConfigError(
            f"got baseline.method={value['method']}, which is one of the methods too; expected another name for one of the two: rename "
            "the method, or take it as the baseline by its name alone"
        )
    return value["method"], Path(value["results"]).expanduser()


def _check_budgets(
    spec: Mapping[str, Any], methods: Mapping[str, Method], budget: Budget | None, baseline: str | None, former: Path | None
) -> None:  # fmt: skip
    share = spec.get("share")
    if share is not None and (baseline is None or not _is_number(share) or not share > 0):
        raise ConfigError(f"got share={share!r}; expected a number above 0, of the total of a `baseline`")
    if former is not None and budget is not None:
        raise ConfigError(
            "got a budget beside a baseline of other results, which is not run again; expected `share` of its evaluations, or a budget "
            "of each method"
        )
    without = [name for name, method in methods.items() if method.budget is None and (baseline in (None, name))]
    if budget is None and without:
        raise ConfigError(
            f"got no budget for {', '.join(without)}; expected budget: {{evaluations: N}} or {{seconds: N}}, of the comparison "
            "or of the method"
        )


def _strings(given: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    values = given.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"got {f'{place}.{key}'.strip('.')}={values!r}; expected a list of texts")
    for value in values:
        if key == "overrides" and ("=" not in value or OWN.fullmatch(value)):
            raise ConfigError(
                f"got the override {value!r} in {f'{place}.{key}'.strip('.')}; expected key=value, and not of what the "
                "comparison sets itself: run.name, run.seed, run.output, and by the budget run.max_…"
            )
    return tuple(values)


def _seeds(given: Mapping[str, Any], place: str) -> tuple[int, ...]:
    seeds = given["seeds"]
    valid = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        raise ConfigError(f"got {f'{place}.seeds'.strip('.')}={seeds!r}; expected a list of different whole numbers")
    return tuple(seeds)


def _budget(given: Mapping[str, Any], place: str) -> Budget | None:
    value, key = given.get("budget"), f"{place}.budget".strip(".")
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"evaluations", "seconds"}:
        raise ConfigError(f"got {key}={value!r}; expected {{evaluations: N}} or {{seconds: N}}")
    [(unit, amount)] = value.items()
    if not _is_number(amount) or not amount > 0 or (unit == "evaluations" and amount != int(amount)):
        raise ConfigError(f"got {key}.{unit}={amount!r}; expected a {'whole ' * (unit == 'evaluations')}number above 0")
    return Budget(unit, float(amount))


def _folder(given: Mapping[str, Any], key: str, default: str) -> Path:
    value = given.get(key, default)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"got {key}={value!r}; expected a folder, or leave the key out for {default}")
    return Path(value).expanduser()


def _is_number(value: Any) -> bool:
    """Finite, and no whole number that is too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
