"""Writes into docs/methods.md the parameters of every part and section, and what the comparison measured of each method; into
docs/rewards.md what is known of every reward."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from flowalign.config import EvaluationSettings, PolicySettings, RunSettings
from flowalign.config.contracts import differences
from flowalign.models import LoRA, Role
from flowalign.objectives import DynamicClip, Gate, Match
from flowalign.rollouts.guidance import Probing, RewardGuidance
from flowalign.rollouts.task import Rollout
from flowalign.rollouts.unscored import BetaStep
from flowalign.trainers import (
    AdamWConfig,
    ColdStart,
    Directions,
    ManifoldAnchor,
    Route,
    Signal,
    Surrogate,
    Teacher,
)
from rewards.listing import cells, entries, first_sentence

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
REWARDS, LIST = PAGE.with_name("rewards.md"), "## The list"
HEADING = "## Parameters"
COMPARISONS = ("glyphs_grpo", "glyphs_trainers", "glyphs_tdm_r1")  # whose results docs/methods.md tells
MEASURED = re.compile(r"(<!-- measured: ([\w ]+) -->\n)(?:.+\n)*")  # the names of methods, and the lines after it
SECTIONS = {
    "run": RunSettings, "policy": PolicySettings, "policy.lora": LoRA, "policy.roles.<name>": Role, "rollout": Rollout,
    "rollout.reward_guidance": RewardGuidance, "rollout.reward_guidance.spsa": Probing,
    "evaluation": EvaluationSettings, "trainer.signal": Signal, "trainer.optimizer": AdamWConfig,
    "trainer.dynamic_clip": DynamicClip, "trainer.surrogate of FewStep": Surrogate, "trainer.directions of FewStep": Directions,
    "trainer.teachers.<name>": Teacher, "trainer.route": Route, "trainer.match": Match,
    "trainer.query": BetaStep, "trainer.anchor": ManifoldAnchor, "trainer.gate": Gate, "trainer.cold_start": ColdStart,
}  # fmt: skip
KINDS = (  # where it stands in a configuration, the package and the contract of its choices
    ("trainer", "flowalign.trainers", "Trainer"),
    ("rollout.plan", "samplers", "Plan"),
    ("position of a Window", "samplers", "Position"),
    ("select of a Selected plan", "samplers", "Select"),
    ("rollout.kernel", "samplers", "Kernel"),
    ("ascent of a Guided kernel", "samplers", "Ascent"),
    ("rollout.schedule, evaluation.schedule", "samplers", "Schedule"),
    ("trainer.calibration", "flowalign.trainers", "Calibration"),
    ("trainer.signal.credit", "flowalign.credit", "Credit"),
    ("trainer.signal.advantage", "flowalign.advantage", "Advantage"),
    ("trainer.signal.select", "flowalign.selectors", "Selector"),
    ("trainer.source", "flowalign.trainers", "SampleSource"),
    ("trainer.objective", "flowalign.objectives", "Objective"),
    ("trainer.objective of ForwardProcess", "flowalign.objectives", "StateObjective"),
    ("trainer.anchors.<name>", "flowalign.objectives", "Anchor"),
    ("trainer.law", "samplers", "SigmaLaw"),
    ("trainer.source", "flowalign.trainers", "SampleSource"),
    ("trainer.step_weight", "flowalign.objectives", "StepWeight"),
    ("trainer.truncation", "flowalign.truncations", "Truncation"),
    ("trainer.loss", "flowalign.objectives", "RewardLoss"),
    ("trainer.regularizers.<name>", "flowalign.objectives", "Regularizer"),
    ("trainer.supervision.<name>", "flowalign.objectives", "Supervision"),
    ("reward, evaluation.rewards, process_rewards", "rewards", "Reward"),
)


def choices(home: ModuleType, contract: str) -> list[tuple[str, type]]:
    """The exported classes of `home` that satisfy its Protocol `contract`."""
    named = ((name, vars(home)[name]) for name in home.__all__)
    classes = [(name, cls) for name, cls in named if inspect.isclass(cls) and not vars(cls).get("_is_protocol")]
    return [(name, cls) for name, cls in classes if _satisfies(cls, vars(home)[contract])]


def _satisfies(cls: type, contract: type) -> bool:
    """Methods and attributes; an attribute may be a parameter of the class."""
    attributes = {name for name, member in vars(contract).items() if isinstance(member, property)}
    return not differences(cls, contract) and attributes <= {*dir(cls), *inspect.signature(cls).parameters}


def reference() -> str:
    """The section, as Markdown."""
    lines = [HEADING, "", "Written by `scripts/write_reference.py`. A parameter without a value has to be given.", ""]
    lines += ["| section | parameters |", "|---|---|"]
    lines += [f"| `{name}` | {parameters(cls)} |" for name, cls in SECTIONS.items()]
    for place, package, contract in KINDS:
        lines += ["", f"### {place}", "", f"| `{package}.…` | parameters | |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {parameters(cls)} | {escaped(first_sentence(cls))} |"
            for name, cls in choices(import_module(package), contract)
        ]
    return "\n".join(lines) + "\n"


def parameters(cls: type) -> str:
    """As in `class_path: cls, init_args: {…}`."""
    given = inspect.signature(cls).parameters.values()
    return ", ".join(f"`{each.name}{default(cls, each)}`" for each in given) or "–"


def default(cls: type, parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    field = vars(cls)["__dataclass_fields__"][parameter.name]
    value = parameter.default if field.default is parameter.default else field.default_factory()
    return f"={text(value)}"


def text(value: Any) -> str:
    """A default as YAML has it; a part by its name."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(text(one) for one in value)}]"
    plain = isinstance(value, int | float | str | dict)
    return (str(value) if value != "" else '""') if plain else type(value).__name__


def escaped(text: str) -> str:
    """As a cell of a table."""
    return text.replace("|", "\\|")


def with_rewards(page: str) -> str:
    """The page of the rewards with the list at its end, a table per kind."""
    lines, kind = [LIST, "", "Written by `scripts/write_reference.py` from `rewards/listing.py`."], ""
    for entry in entries():
        columns = {**cells(entry), "": entry.about}
        if entry.kind != kind:
            kind = entry.kind
            lines += ["", f"### {kind}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        columns["reward"] = f"`{entry.name}`"
        lines.append(f"| {' | '.join(map(escaped, columns.values()))} |")
    return page.partition(f"\n{LIST}\n")[0].rstrip() + "\n\n" + "\n".join(lines) + "\n"


def measured(names: list[str]) -> str:
    """What these methods reached on Glyphs, a line each, then their curves; "Not measured yet." for one that is in no comparison."""
    told, curves = [], []
    for name in names:
        for comparison in COMPARISONS:
            file = PAGE.parent / "results" / f"{comparison}.json"
            results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"methods": {}}
            if name in results["methods"]:
                told.append(_told(name, results["methods"][name], results["denominator_evaluations"]))
                if name != results["baseline"]:
                    curves.append(f"![{name}](results/{comparison}/methods/{name}.svg)")
                break
        else:
            told.append(f"Not measured here (`{name}`).  ")
    return "\n".join([*told, " ".join(curves)]).rstrip() + "\n"


def _told(name: str, result: dict[str, Any], denominator: float | None) -> str:
    low, high = result["gain_ci95"]
    seeds, evaluations, reached = result["seeds"], result["evaluations"], result["evaluations_to_target"]
    text = (
        f"Measured (`{name}`, {len(seeds)} seed{'s' * (len(seeds) > 1)}): {result['base']:.3f} → {result['tuned']:.3f}, "
        f"{result['gain']:+.3f} [{low:+.3f}, {high:+.3f}] with {evaluations:,} evaluations"
    )
    share = f" ({evaluations / denominator:.2f}×)" if denominator else ""
    target = f"; the target at {reached / denominator:.2f}×" if denominator and reached else ""
    return f"{text}{share}, {result['decodes']:,} decodes{target}.  "


def with_reference(page: str) -> str:
    """The page with what was measured as it is now, and with the parameters at its end."""
    text = page.partition(f"\n{HEADING}\n")[0].rstrip() + "\n\n"
    return MEASURED.sub(lambda found: found[1] + measured(found[2].split()), text) + reference()


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    REWARDS.write_text(with_rewards(REWARDS.read_text(encoding="utf-8")), encoding="utf-8")
