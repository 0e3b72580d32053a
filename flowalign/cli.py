"""The command line: `flowalign train | evaluate | optimize-noise | compare | forecast | doctor | benchmark | report | export | …`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout

from flowalign.commands.output import IgnoresBrokenPipe

USAGE = """usage: flowalign train CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign evaluate [NAME=]MODEL ... [--no-base] [--prompts SOURCE] [--count N] [--samples N] [--seed N]
                          [--image FILE ...] [--rewards REWARD ...] [--steps N] [--guidance X]
                          [--size HEIGHTxWIDTH] [--fps X] [--batch-size N] [--output FOLDER]
       flowalign optimize-noise MODEL (PROMPT ... | --prompts SOURCE [--count N]) --rewards REWARD ... [--weights X ...]
                          [--image FILE ...] [--held-out REWARD ...] [--method NAME] [--steps N] [--learning-rate X] [--seed N]
                          [--start FOLDER] [--sampling-steps N] [--guidance X] [--patience N] [--batch-size N]
                          [--size HEIGHTxWIDTH] [--fps X] [--dtype fp32|bf16] [--checkpoint] [--device NAME]
                          [--output FOLDER]
       flowalign forecast CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign doctor CONFIG.yaml [CONFIG.yaml ...] [key=value ...]
       flowalign benchmark CONFIG.yaml [CONFIG.yaml ...] [--iterations N] [--variants NAME,NAME] [--output FOLDER]
                           [key=value ...]
       flowalign compare SPEC.yaml [--workers N] [--only METHOD ...] [--only-report]
       flowalign compare CONFIG.yaml ... --with CONFIG.yaml ... --seeds N ... (--evaluations N | --seconds N)
                         [--baseline NAME] [--set key=value ...] [--workers N] [--only-report]
       flowalign report RUN
       flowalign export RUN [--step N] [--ema | --no-ema] [--output FOLDER]
       flowalign serve-reward (CONFIG.yaml ... | CLASS) [reward.key=value ...] [--port N] [--host ADDRESS]
                              [--token-env VARIABLE]
       flowalign rewards [NAME ...] [--wide] [--json]

Trains as the files say, later files over earlier ones (configs/methods/… configs/models/… configs/rewards/…); dotted keys
override them, for example rollout.group_size=24 run.name=wide. Evaluate measures models on the same prompts and seeds, a
run folder, runs/a@40 for a checkpoint, a pipeline, and writes scores, images and a page (docs/evaluate.md). Optimize-noise
keeps a model as it is and finds start noise whose image the rewards like better (docs/noise.md). Forecast says what a run will
cost and need of a device, and loads no model (docs/gpu.md). The doctor measures in about
a minute whether a configuration can train: one line per check, exit code 1 if one fails. The benchmark times an iteration
beside the same iteration with less sharing. Compare runs configurations × seeds on equal budgets and writes a table, curves
and a page (docs/compare.md); the same command goes on where it stopped. The report of a run folder is written anew from what
is in it, also while the run goes on. Export writes what was trained, a LoRA or networks, at a checkpoint (the latest,
averaged if the run keeps an average) for diffusers and PEFT. Serve-reward answers rewards.Http with the files' reward until
Ctrl-C or SIGTERM (docs/places.md). Rewards lists those of the package, or shows all that is known of some (docs/rewards.md).
On several devices: accelerate launch scripts/train.py CONFIG.yaml [CONFIG.yaml ...] [key=value ...], and
scripts/evaluate.py in the place of flowalign evaluate."""


HELP = ("-h", "--help")


def usage(arguments: Sequence[str]) -> int:
    """Prints how the command is used. Exit code: 0 if that was asked for, else 2."""
    asked = bool(arguments) and arguments[0] in HELP
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _run(command: Callable[[Sequence[str]], int], arguments: Sequence[str], *, needs_arguments: bool = True) -> int:
    """The exit code of a command; see `ending` for those of errors. Modules in the working directory can be imported, as with
    `python -m`, but never in place of an installed one."""
    if (needs_arguments and not arguments) or (arguments and arguments[0] in HELP):
        return usage(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with redirect_stdout(IgnoresBrokenPipe(sys.stdout)), redirect_stderr(IgnoresBrokenPipe(sys.stderr)):
        try:
            return command(arguments)
        except (Exception, KeyboardInterrupt) as error:
            from flowalign.commands.endings import ending

            end = ending(error)
            if end is None:
                raise
            code, sentence = end
            print(sentence, file=sys.stderr)
            return code


def _hide_loading_bars() -> None:
    """Of diffusers and transformers."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def train(arguments: Sequence[str]) -> int:
    """Trains. Exit code 0: done."""
    return _run(_train, arguments)


def _train(arguments: Sequence[str]) -> int:
    from flowalign.config import load_config
    from flowalign.config.layers import split_arguments
    from flowalign.loop import train as run

    run(*load_config(*split_arguments(arguments)))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measures models. Exit code 0: done."""
    return _run(_evaluate, arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from flowalign.commands.evaluate import evaluate as run

    _hide_loading_bars()
    run(arguments)
    return 0


def optimize_noise(arguments: Sequence[str]) -> int:
    """Optimizes start noise. Exit code 0: done."""
    return _run(_optimize_noise, arguments)


def _optimize_noise(arguments: Sequence[str]) -> int:
    from flowalign.commands.optimize_noise import optimize as run

    _hide_loading_bars()
    run(arguments)
    return 0


def forecast(arguments: Sequence[str]) -> int:
    """Prints what a run costs and how much memory it needs. Exit code 0: it can fit; 2: it cannot."""
    return _run(_forecast, arguments)


def _forecast(arguments: Sequence[str]) -> int:
    import torch

    from flowalign.config import load_config
    from flowalign.config.layers import split_arguments
    from flowalign.forecast.memory import device_memory, state_memory
    from flowalign.run.preflight import forecast as counts

    config, _ = load_config(*split_arguments(arguments))
    print(counts(config), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state_memory(config, device_memory(config, device), print)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Prints each finding once it is known. Exit code: 0 all well or warnings, 1 a failure."""
    return _run(_doctor, arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from flowalign.config.layers import split_arguments
    from flowalign.diagnostics.doctor import diagnose

    _hide_loading_bars()
    well = True
    for finding in diagnose(*split_arguments(arguments)):
        print(finding, flush=True)
        well = well and finding.ok is True
    return 0 if well else 1


def benchmark(arguments: Sequence[str]) -> int:
    """Times variants of an iteration. Exit code 0: done."""
    return _run(_benchmark, arguments)


def _benchmark(arguments: Sequence[str]) -> int:
    from flowalign.diagnostics.benchmark import main as run

    run(arguments)
    return 0


def compare(arguments: Sequence[str]) -> int:
    """Compares configurations and prints the paths of the results. Exit code 0: done."""
    return _run(_compare, arguments)


def _compare(arguments: Sequence[str]) -> int:
    from flowalign.compare.command import compare as run

    print(*run(arguments), sep="\n")
    return 0


def report(arguments: Sequence[str]) -> int:
    """Writes a run's report.html anew and prints its path. Exit code 0: done."""
    return _run(_report, arguments)


def _report(arguments: Sequence[str]) -> int:
    from flowalign.errors import ConfigError
    from flowalign.report.html import write_report
    from flowalign.run.folder import run_folder

    if len(arguments) > 1:
        raise ConfigError(f"flowalign report: got {' '.join(arguments)}; expected one run folder")
    print(write_report(run_folder(arguments[0])))
    return 0


def export(arguments: Sequence[str]) -> int:
    """Writes the weights of a run's checkpoint and prints its folder. Exit code 0: done."""
    return _run(_export, arguments)


def _export(arguments: Sequence[str]) -> int:
    from flowalign.commands.export import export as run

    print(run(arguments))
    return 0


def serve_reward(arguments: Sequence[str]) -> int:
    """Serves a reward over HTTP until it is stopped. Exit code 0: stopped by SIGTERM or Ctrl-C."""
    return _run(_serve_reward, arguments)


def _serve_reward(arguments: Sequence[str]) -> int:
    from flowalign.commands.serve_reward import serve_reward as run

    run(arguments)
    return 0


def rewards(arguments: Sequence[str]) -> int:
    """Lists the rewards. Exit code 0: done."""
    return _run(_rewards, arguments, needs_arguments=False)


def _rewards(arguments: Sequence[str]) -> int:
    from argparse import ArgumentError

    from flowalign.errors import ConfigError
    from rewards.__main__ import command

    try:
        return command(arguments)
    except (ValueError, ArgumentError) as error:
        raise ConfigError(f"flowalign rewards: {error}") from error


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "optimize-noise": optimize_noise,
    "compare": compare,
    "forecast": forecast,
    "doctor": doctor,
    "benchmark": benchmark,
    "report": report,
    "export": export,
    "serve-reward": serve_reward,
    "rewards": rewards,
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.exit(COMMANDS[arguments[0]](arguments[1:]))
    if arguments and arguments[0] not in HELP:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"unknown command {arguments[0]!r}: {hint}Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(usage(arguments))


if __name__ == "__main__":
    main()
