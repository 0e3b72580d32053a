"""`flowalign compare`: from its arguments to the files it writes."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowalign.compare.former import former_records
from flowalign.compare.launch import Launcher
from flowalign.compare.page import best, write_page
from flowalign.compare.plan import Plan, Planned, budget_of, former_record, has_own_budget, is_done
from flowalign.compare.record import Record, is_beyond, read_record, write_record
from flowalign.compare.results import as_json, as_markdown, mean_totals, results_of
from flowalign.compare.spec import Comparison, of_files, read_spec
from flowalign.errors import ConfigError, RunError
from flowalign.storage.files import write_atomic

# options of a comparison without a file of its own
PLAIN = ("with", "seeds", "evaluations", "seconds", "baseline", "set")


def compare(arguments: Sequence[str]) -> list[Path]:
    """Runs what is not done yet, then writes the results. Returns their paths. ConfigError before anything is run, RunError if
    runs failed; what is finished is written all the same."""
    given = _parsed(arguments)
    if given.workers < 1:
        raise ConfigError(f"got --workers {given.workers}; expected at least 1")
    comparison = _comparison(given, arguments)
    names = list(dict.fromkeys(comparison.methods if given.only is None else given.only))
    if unknown := [name for name in names if name not in comparison.methods]:
        raise ConfigError(f"got --only {' '.join(unknown)}; expected of the methods {', '.join(comparison.methods)}")
    plan, failures = Plan.of(comparison), list[str]()
    former = former_records(plan)
    found = records(plan, former)  # a damaged one is named before anything is run
    if not given.only_report:
        failures = _run(plan, former, names, given.workers)
        found = records(plan, former)
    written = write_results(comparison, found, former) if any(found.values()) or not failures else []
    if failures:
        raise RunError(f"{len(failures)} runs failed: {'; '.join(failures)}. The same command tries them again")
    return written


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flowalign compare", exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--with", nargs="+", default=[])
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--evaluations", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--baseline")
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"flowalign compare: {error}") from error
    if unknown:
        raise ConfigError(f"flowalign compare: got {' '.join(unknown)}; see flowalign compare --help")
    return given


def _comparison(given: argparse.Namespace, arguments: Sequence[str]) -> Comparison:
    options = vars(given)
    if len(given.files) == 1 and all(options[key] in (None, []) for key in PLAIN):
        return read_spec(given.files[0])
    if not given.seeds:
        raise ConfigError(
            "got several files, or options of a comparison without a file of its own, but no --seeds; expected --seeds 1 2 3 "
            "and --evaluations N or --seconds N, or one file SPEC.yaml and neither of them"
        )
    budget = {unit: options[unit] for unit in ("evaluations", "seconds") if options[unit] is not None}
    kept = [each for each in arguments if each != "--only-report"]
    command = shlex.join(["flowalign", "compare", *kept])
    return of_files(given.files, options["with"], given.set, given.seeds, budget, given.baseline, command)


def _run(plan: Plan, former: Sequence[Record], names: Sequence[str], workers: int) -> list[str]:
    """Runs these methods: first the baseline, unless it is of other results, and what has a budget of its own, then what gets a
    share of the baseline's total. Returns what failed, in sentences."""
    comparison, baseline = plan.comparison, plan.comparison.baseline
    own = sorted((name for name in names if has_own_budget(comparison, name)), key=lambda name: name != baseline)
    sharing = [name for name in names if name not in own]
    if sharing and baseline not in names and _denominator(plan, former) is None:
        raise ConfigError(
            f"got --only {' '.join(names)}, where the budget of {', '.join(sharing)} is a share of the total of {baseline}, which is "
            f"not finished; expected it to be: run it first, or add it to --only"
        )
    launcher = Launcher(workers, (0, sum(len(comparison.methods[name].seeds) for name in names)), write_record)
    _launch(launcher, [run for name in own for run in _runs(plan, name, None)])
    if sharing:
        denominator = _denominator(plan, former)
        if denominator is None:
            told = f"not begun: {', '.join(sharing)}, whose budget is a share of the total of {baseline}"
            return [*launcher.failures, told]
        _launch(launcher, [run for name in sharing for run in _runs(plan, name, denominator)])
    return launcher.failures


def _launch(launcher: Launcher, runs: Sequence[Planned]) -> None:
    """Runs those that are not done, less those whose folder has gone beyond their budget: they are failures."""
    missing = [run for run in runs if not is_done(run)]
    beyond = [run for run in missing if is_beyond(run)]
    launcher.failures += [
        f"{run.folder} was begun with a larger budget and is beyond {run.budget.override}; remove it, or set another `output`"
        for run in beyond
    ]
    waiting = [run for run in missing if run not in beyond]
    for run in waiting:
        if former := former_record(run):
            print(
                f"note: {former} was made by other files; if they say the same, stop here and rename it to {run.record.name}",
                flush=True,
            )
    done, total = launcher.numbers
    launcher.numbers = (done + len(runs) - len(waiting), total)
    launcher.run(waiting)


def _denominator(plan: Plan, former: Sequence[Record]) -> Mapping[str, float] | None:
    """The baseline's mean totals; None without one, and until all its runs are finished."""
    name = plan.comparison.baseline
    if former:
        return mean_totals(former)
    if name is None:
        return None
    runs = _runs(plan, name, None)
    return mean_totals([read_record(run) for run in runs]) if all(map(is_done, runs)) else None


def _runs(plan: Plan, name: str, denominator: Mapping[str, float] | None) -> list[Planned]:
    return plan.runs(name, budget_of(plan.comparison, name, denominator))


def records(plan: Plan, former: Sequence[Record] = ()) -> dict[str, list[Record]]:
    """The finished runs of each method."""
    comparison, denominator = plan.comparison, _denominator(plan, former)
    return {
        name: [read_record(run) for run in _runs(plan, name, denominator) if is_done(run)]
        for name in comparison.methods
        if has_own_budget(comparison, name) or denominator is not None
    }


def write_results(
    comparison: Comparison, found: Mapping[str, Sequence[Record]], former: Sequence[Record] = ()
) -> list[Path]:  # fmt: skip
    """NAME.json, NAME.md, NAME.html and the plots in NAME/, of the comparison's name. ConfigError without a finished run."""
    if not any(found.values()):
        raise ConfigError(f"no run of {comparison.name} is finished: leave --only-report out to run them")
    results = results_of(comparison, found, former)
    base = comparison.results / comparison.name
    paths = [base.with_name(f"{comparison.name}{ending}") for ending in (".json", ".md", ".html")]
    write_atomic(paths[0], (json.dumps(as_json(results), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(paths[1], as_markdown(results).encode())
    write_page(results, paths[2])
    if headline := best(results):
        print(headline, flush=True)
    return paths
