"""`flowalign optimize-noise`: from its arguments to the folder with the images that were found."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from flowalign.commands.size import size_of
from flowalign.commands.source import with_source
from flowalign.config import load_reward
from flowalign.data import PromptRecord, as_records, load_prompts
from flowalign.errors import ConfigError, RunError
from flowalign.models.checks import check_image_size
from flowalign.noise_optimization import Ascent, Gradient, optimize_noise, read_noise
from flowalign.noise_optimization.optimize import METHODS, check
from flowalign.run.places import Place
from rewards import RewardError, close

OPTIONS = {
    "--prompts": str, "--count": int, "--method": str, "--steps": int, "--learning-rate": float, "--seed": int,
    "--start": Path, "--sampling-steps": int, "--guidance": float, "--patience": int, "--batch-size": int,
    "--size": str, "--fps": float, "--dtype": str, "--device": str, "--output": Path,
}  # fmt: skip
DEFAULTS = {"method": "gradient", "steps": 50, "seed": 0, "batch_size": 4}


def optimize(arguments: Sequence[str]) -> None:
    """Optimizes, prints a line per prompt and the folder. ConfigError before a model is loaded for what cannot be."""
    given = _parsed(arguments)
    place, records = _place(given), _records(given)
    size = None if given.size is None else size_of(given.size, place.policy.frames)
    rewards = {load_reward([source]): weight for source, weight in _weighted(given)}
    held_out = [load_reward([source]) for source in given.held_out]
    try:
        start = None if given.start is None else read_noise(given.start)
        ascent = Ascent() if given.learning_rate is None else Ascent(learning_rate=given.learning_rate)
        method = Gradient(ascent) if given.method == "gradient" else METHODS[given.method]()
        check(records, list(rewards.items()), held_out, method)
        place.check_sources(records)
        if size is not None:
            check_image_size(place.policy.path, size, place.policy.family)
    except (ValueError, OSError) as error:
        raise ConfigError(f"flowalign optimize-noise: {error}") from error
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as leaving:
        for reward in (*rewards, *held_out):
            leaving.callback(close, reward)
        policy = place.load(place.sampling, device)
        try:
            found = optimize_noise(
                policy, records, rewards, steps=given.steps, method=method, held_out=held_out, seed=given.seed,
                start=start, num_inference_steps=given.sampling_steps, guidance_scale=given.guidance,
                size=size, fps=given.fps, patience=given.patience, batch_size=given.batch_size, checkpoint=given.checkpoint,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"flowalign optimize-noise: {error}") from error
        except RewardError as error:
            raise RunError(f"{error}; nothing was saved, the same command begins anew") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("stopped; nothing was saved, the same command begins anew") from error
    for row, prompt in enumerate(found.prompts):
        others = [f"{name} {float(a[row]):.4g} → {float(b[row]):.4g}" for name, (a, b) in found.held_out.items()]
        print(
            f"{prompt}: {', '.join([f'{float(found.first_total[row]):.4g} → {float(found.total[row]):.4g}', *others])}"
        )
    print(found.save(given.output))


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowalign optimize-noise", exit_on_error=False, allow_abbrev=False, add_help=False
    )
    parser.add_argument("model")
    parser.add_argument("prompt", nargs="*")
    parser.add_argument("--rewards", nargs="+", default=[])
    parser.add_argument("--weights", nargs="+", type=float)
    parser.add_argument("--held-out", nargs="+", default=[])
    parser.add_argument("--image", nargs="+", type=Path)
    parser.add_argument("--checkpoint", action="store_true")
    for option, kind in OPTIONS.items():
        name = option.removeprefix("--").replace("-", "_")
        parser.add_argument(option, type=kind, default=DEFAULTS.get(name))
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"flowalign optimize-noise: {error}") from error
    if unknown:
        raise ConfigError(
            f"flowalign optimize-noise: got {' '.join(unknown)}; see flowalign optimize-noise --help for its options"
        )
    if not given.rewards or bool(given.prompt) == bool(given.prompts):
        raise ConfigError(
            f"flowalign optimize-noise: got {len(given.prompt)} prompts, --prompts {given.prompts} and {len(given.rewards)} rewards; "
            "expected texts or --prompts SOURCE, and --rewards REWARD ..."
        )
    if given.method not in METHODS:
        raise ConfigError(f"got --method {given.method}; expected one of {', '.join(METHODS)}")
    if given.learning_rate is not None and given.method != "gradient":
        raise ConfigError(f"got --learning-rate with --method {given.method}; expected it with gradient alone")
    if given.output is None:
        first = re.sub(r"[^A-Za-z0-9]+", "-", given.prompt[0] if given.prompt else Path(given.prompts).stem)
        given.output = Path("runs", "noise", f"{first.strip('-')[:60]}-{given.seed}")
    if (given.output.exists() and not given.output.is_dir()) or (given.output / "result.json").exists():
        raise ConfigError(
            f"got --output {given.output}, a file or an earlier result; expected another folder: name one"
        )
    try:
        torch.device(given.device or "cpu")
    except RuntimeError as error:
        raise ConfigError(f"got --device {given.device}; expected cpu, cuda or cuda:N") from error
    return given


def _place(given: argparse.Namespace) -> Place:
    """The model, a pipeline multiplying in --dtype (fp32). ConfigError for a run with another one."""
    place = Place.of(given.model)
    if given.dtype is None:
        return place
    if given.dtype not in ("fp32", "bf16") or place.saved is not None:
        raise ConfigError(
            f"got --dtype {given.dtype} for {given.model}; expected fp32 or bf16 for a pipeline, and none for a run, which has its own"
        )
    return replace(place, policy=replace(place.policy, dtype=given.dtype))


def _records(given: argparse.Namespace) -> list[PromptRecord]:
    """The texts, or the first --count prompts of the set, with the source images of --image."""
    if given.prompt:
        return with_source(as_records(given.prompt), given.image)
    try:
        records = load_prompts(given.prompts)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--prompts: {error}") from error
    if given.count is not None and not 1 <= given.count <= len(records):
        raise ConfigError(f"got --count {given.count}; expected 1 to {len(records)}, the prompts of {given.prompts}")
    return with_source(records[: given.count], given.image)


def _weighted(given: argparse.Namespace) -> list[tuple[str, float]]:
    weights = given.weights or [1.0] * len(given.rewards)
    if len(weights) != len(given.rewards):
        raise ConfigError(f"got {len(weights)} --weights for {len(given.rewards)} --rewards; expected one for each")
    return list(zip(given.rewards, weights, strict=True))
