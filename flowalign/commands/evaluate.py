"""`flowalign evaluate`: from its arguments to the folder with what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from flowalign.commands.size import size_of
from flowalign.commands.source import with_source
from flowalign.config import load_judges, load_reward
from flowalign.data import PromptRecord, load_prompts
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError, RunError
from flowalign.evaluation.columns import metrics
from flowalign.models import Size
from flowalign.models.shipped import SHIPPED, resolve
from flowalign.run.evaluate_columns import evaluate_columns
from flowalign.run.held_out_rewards import with_trained
from flowalign.run.launch import check_devices, check_environment
from flowalign.run.load import Judged, read_judged
from flowalign.run.places import BASE, Place, column_name, find_places
from rewards import OCR, CLIPScore, Reward, RewardError, close

OPTIONS = {"--prompts": str, "--count": int, "--samples": int, "--seed": int, "--steps": int, "--guidance": float,
           "--size": str, "--fps": float, "--batch-size": int, "--output": str}  # fmt: skip
COUNT, BATCH_SIZE, SEED = 256, 64, 1234  # without a run; those of evaluation.* by default
WAIT = timedelta(hours=12)  # for the process whose last part takes longest


def evaluate(arguments: Sequence[str]) -> None:
    """Measures, prints a table and the paths. ConfigError before a model is loaded for what cannot be."""
    given = _parsed(arguments)
    texts = _columns(given.models, base=given.base)
    request = _request(given, find_places(texts))
    accelerator = _accelerator()
    processes, device = Processes.of(accelerator), accelerator.device
    if (
        device.type == "cpu"
    ):  # several processes are on cpu:0, to which weights are copied: aligned otherwise, they round otherwise
        device = torch.device("cpu")
    with ExitStack() as leaving:
        for judge in request.judges:
            leaving.callback(close, judge)
        leaving.callback(accelerator.end_training)
        try:
            evaluation = evaluate_columns(
                texts, request.records, request.judges, output=request.output, num_inference_steps=given.steps,
                guidance_scale=given.guidance, size=request.size, fps=given.fps, seed=request.seed, samples_per_prompt=request.samples,
                batch_size=request.batch_size, device=device, processes=processes,
            )  # fmt: skip
        except RewardError as error:
            raise RunError(f"{error}; finished parts are in {request.output}, and the same command goes on") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"stopped; finished parts are in {request.output}, and the same command goes on"
            ) from error
    if processes.is_main:
        print(table(metrics(evaluation)))
        print(
            *(request.output / name for name in ("report.html", "grid.png", "metrics.json", "scores.csv", "images")),
            sep="\n",
        )


def _accelerator() -> Accelerator:
    """ConfigError for settings of accelerate that an evaluation would ignore."""
    check_environment()
    check_devices()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) or accelerator.mixed_precision != "no":
        raise ConfigError(
            f"got accelerate's distributed_type={kind.value} and mixed_precision={accelerator.mixed_precision}; expected plain "
            "processes, each with a whole model, such as configs/accelerate/multi_gpu.yaml"
        )
    return accelerator


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flowalign evaluate", exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--no-base", dest="base", action="store_false")
    parser.add_argument("--rewards", nargs="+")
    parser.add_argument("--image", nargs="+", type=Path)
    for option, kind in OPTIONS.items():
        parser.add_argument(option, type=kind)
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"flowalign evaluate: {error}") from error
    if unknown or not given.models:
        raise ConfigError(
            f"flowalign evaluate: got {' '.join(unknown) or 'no model'}; expected models such as runs/a, runs/a@40 or glyphs, then "
            f"--no-base, --rewards REWARD ..., --image FILE ..., {', '.join(OPTIONS)}"
        )
    for name in ("count", "samples", "steps", "batch_size"):
        if vars(given)[name] is not None and vars(given)[name] < 1:
            raise ConfigError(
                f"flowalign evaluate: got --{name.replace('_', '-')} {vars(given)[name]}; expected at least 1"
            )
    return given


def _columns(models: Sequence[str], *, base: bool) -> dict[str, str]:
    """The places by column. The first run's pipeline comes first, if it is wanted and not among them."""
    columns: dict[str, str] = {}
    for model in models:
        name, sign, place = model.rpartition("=")
        name = name if sign else column_name(place)
        if name in columns:
            raise ConfigError(f"got two columns named {name}; expected different names: write NAME={place}")
        columns[name] = place
    places = find_places(columns)
    run = next((place for place in places.values() if place.saved is not None), None)
    if not base or run is None or any(_is_same(place, run) for place in places.values() if place.saved is None):
        return columns
    if BASE in columns:
        raise ConfigError(
            f"got a column named {BASE}, beside the pipeline of {run.text}; expected another name, or --no-base"
        )
    return {BASE: BASE, **columns}


def _is_same(pipeline: Place, run: Place) -> bool:
    return Path(resolve(pipeline.policy.path)).absolute() == Path(resolve(run.policy.path)).absolute()


@dataclass(frozen=True, eq=False)
class _Request:
    """What is measured, and where it goes."""

    records: list[PromptRecord]
    judges: list[Reward]
    size: Size | None
    seed: int
    samples: int
    batch_size: int
    output: Path


def _request(given: argparse.Namespace, places: dict[str, Place]) -> _Request:
    """What is said, then what the first run says, then defaults; for Glyphs alone also prompts and rewards."""
    run = next((place for place in places.values() if place.saved is not None), None)
    judged = None if run is None or run.saved is None else read_judged(run.saved.folder)
    settings: dict[str, Any] = {} if judged is None else vars(judged.evaluation)
    glyphs = judged is None and all(place.policy.path in SHIPPED for place in places.values())
    source = given.prompts or settings.get("prompts") or ("flowalign.glyphs:held_out_prompts" if glyphs else None)
    if source is None or (judged is None and not glyphs and given.rewards is None):
        raise ConfigError(
            "got no run that says what to evaluate on; expected --prompts SOURCE and --rewards REWARD ... beside a pipeline, such as "
            "--prompts prompts.txt --rewards rewards.CLIPScore"
        )
    names = [name for name in places if name != BASE] or list(places)
    output = Path(given.output or Path("runs", "evaluations", "-".join(names)[:100])).expanduser()
    return _Request(
        _records(source, given, settings), _judges(given.rewards, judged),
        None if given.size is None else size_of(given.size, 1 if run is None else run.policy.frames),
        _first(given.seed, settings.get("seed"), SEED), _first(given.samples, settings.get("samples_per_prompt"), 1),
        _first(given.batch_size, settings.get("batch_size"), BATCH_SIZE), output,
    )  # fmt: skip


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _records(source: str, given: argparse.Namespace, settings: dict[str, Any]) -> list[PromptRecord]:
    """The first prompts of the set: --count of them; else all of one that was named, or as many as the run evaluates."""
    try:
        records = load_prompts(source)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--prompts: {error}") from error
    if given.count is not None and given.count > len(records):
        raise ConfigError(f"got --count {given.count}; expected at most the {len(records)} prompts of {source}")
    chosen = records[: given.count or (len(records) if given.prompts else settings.get("count", COUNT))]
    return with_source(chosen, given.image)


def _judges(named: Sequence[str] | None, judged: Judged | None) -> list[Reward]:
    """Those that are named; else those of the run's evaluations, with its training reward; else those of Glyphs."""
    if named is None and judged is None:
        return [OCR(metric="exact", fold={"0": "O"}, name="ocr_exact"), CLIPScore(model="glyphs")]
    if named is None:
        assert judged is not None
        own = list(judged.evaluation.rewards)
        return with_trained(own, judged.reward) if judged.evaluation.training_reward else own
    judges: list[Reward] = []
    for source in named:
        listed, trained = load_judges(source) if source.endswith((".yaml", ".yml")) else ([load_reward([source])], None)
        for reward in [*listed, *([] if trained is None else [trained])]:
            judges = with_trained(judges, reward)
    return judges


def table(figures: dict[str, Any]) -> str:
    """metrics.json as text: a block per reward, a line per column: its mean, and gain and win rate over the first column."""
    columns, baseline = figures["columns"], figures["baseline"]
    width = max(len(name) for name in columns)
    lines = []
    for reward in figures["rewards"]:
        trained = "trained on" if reward in figures["trained"] else "held out"
        lines.append(f"{reward} ({trained})")
        for name in columns:
            line = f"  {name:{width}}  {_number(figures['mean'][name][reward])}"
            lines.append(line if name == baseline else f"{line}  {_gain(figures['gain'][name][reward])}")
    return "\n".join(lines)


def _gain(gain: dict[str, Any]) -> str:
    if gain["gain"] is None:
        return "no pair with two scores"
    low, high = gain["ci95"] or (None, None)
    interval = f" [{_number(low, '+')}, {_number(high, '+')}]" if gain["ci95"] else ""
    dropped = f", {gain['dropped']} without a score" if gain["dropped"] else ""
    return f"{_number(gain['gain'], '+')}{interval}, wins {100 * gain['win_rate']:.0f} %{dropped}"


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"
