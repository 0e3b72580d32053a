"""Measures several models on the same prompts and seeds, in a folder from which it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch

from flowalign.data import PromptRecord, Sources, as_records, check_images
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.evaluation.columns import Evaluation
from flowalign.evaluation.evaluate import as_rewards, check_request
from flowalign.evaluation.parts import Column, Measurement, Missing, Store, make_parts, missing_parts, read_column
from flowalign.models import Policy, Sampling, Size
from flowalign.models.checks import rows_per_state
from flowalign.models.lora import adapter_switches
from flowalign.models.sampling import settle
from flowalign.report.evaluation_files import write_evaluation
from flowalign.run.folder import lock_folder
from flowalign.run.held_out_rewards import trained_labels
from flowalign.run.load import read_judged
from flowalign.run.places import Place, find_places
from flowalign.run.trial import try_judges
from flowalign.storage.metrics_log import MetricsLog, Row
from rewards import Reward, spec_of
from samplers import Schedule


def evaluate_columns(
    columns: Mapping[str, Policy | str | Path],
    prompts: str | Sequence[str | PromptRecord],
    rewards: Sequence[Reward | Callable[..., Any] | str],
    *,
    output: str | Path | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    size: Size | None = None,
    schedule: Schedule | None = None,
    fps: float | None = None,
    seed: int = 0,
    samples_per_prompt: int = 1,
    images: Sources | None = None,
    batch_size: int = 8,
    trained: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    processes: Processes | None = None,
    progress: bool = True,
) -> Evaluation:
    """Generates every prompt with every model from the same noise, and scores the images; see `evaluate` for one model.

    columns: by name, a policy as it is, or a place: a pipeline, a run folder `runs/a`, a checkpoint `runs/a@40:raw`, or `base`
    (see flowalign.run.places). The first is what the others are compared with. A place is loaded when it is its turn, and let go
    of after it. What is None is as the first run evaluates, without a run as the first policy samples; all columns are made
    alike. images: source images of an edit, see `flowalign.data.with_images`. trained: labels of rewards that a column was trained on; None: what the runs say.

    output: a folder for metrics.json, scores.csv, images, grid and page; it also holds finished parts, so that the same call
    goes on where an earlier one stopped. Parts of other settings are refused. Several `processes` need one, and make the parts
    in turn. ConfigError before a model is loaded for what cannot be; a reward that raises is a RewardError, an image without
    a score is nan."""
    everyone = processes or Processes()
    if output is None and everyone.count > 1:
        raise ConfigError(f"got {everyone.count} processes without an output folder; expected one for their parts")
    models = _Models.of(columns)
    default = models.sampling if size is not None else models.sampling_of_one_size()
    try:
        records, judges = as_records(prompts, images), as_rewards(rewards)
        check_request(records, judges, batch_size, samples_per_prompt)
        check_images(records)
        settings = settle(
            default, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, size=size,
            schedule=schedule, fps=fps,
        )  # fmt: skip
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    for place in models.places.values():
        place.check(settings)
        place.check_sources(records)
    _check_rewards(judges, samples_per_prompt)
    known = models.trained(judges) if trained is None else frozenset(trained)
    measurement = Measurement(records, judges, settings, seed, samples_per_prompt, batch_size)
    with ExitStack() as leaving:
        folder = Path(leaving.enter_context(TemporaryDirectory()) if output is None else output).expanduser()
        if output is not None and everyone.is_main:
            leaving.enter_context(_lock(folder))
        store = Store(folder, keep_images=output is not None)
        listed = models.listed(settings, device, hashed=output is not None)
        _measure(store, measurement, listed, everyone, device, progress)
        evaluation = _read(store, measurement, listed, known)
        if output is not None and everyone.is_main:
            write_evaluation(evaluation, folder, models.curves())
    return evaluation


@dataclass(frozen=True, eq=False)
class _Models:
    """The columns' names in their order; where they are, or what they are."""

    names: list[str]
    places: dict[str, Place]
    policies: dict[str, Policy]

    @staticmethod
    def of(columns: Mapping[str, Policy | str | Path]) -> _Models:
        """ConfigError for names that cannot be, and for places that hold no model."""
        _check_names(columns)
        places = {name: str(place) for name, place in columns.items() if isinstance(place, str | Path)}
        policies = {name: place for name, place in columns.items() if not isinstance(place, str | Path)}
        return _Models(list(columns), find_places(places), policies)

    @property
    def runs(self) -> list[Place]:
        """Those places that are runs."""
        return [place for place in self.places.values() if place.saved is not None]

    @property
    def sampling(self) -> Sampling | None:
        """As the first run evaluates, else as the first column samples."""
        if self.runs:
            return self.runs[0].sampling
        first = self.names[0]
        return self.places[first].sampling if first in self.places else self.policies[first].sampling

    def sampling_of_one_size(self) -> Sampling | None:
        """The same; ConfigError for runs of different sizes."""
        sizes = {place.text: place.policy.size for place in self.runs}
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{size.height}×{size.width}×{size.frames} of {text}" for text, size in sizes.items())
            raise ConfigError(f"got runs of different sizes: {said}; expected one: say the size that all are made in")
        return self.sampling

    def trained(self, judges: Sequence[Reward]) -> frozenset[str]:
        """The labels of the judges that one of the runs was trained on."""
        folders = {place.saved.folder for place in self.runs if place.saved is not None}
        return trained_labels(judges, [read_judged(folder).reward for folder in sorted(folders)])

    def curves(self) -> dict[str, list[Row]]:
        """The rows of metrics.jsonl of the columns that are runs."""
        runs = {name: place.saved for name, place in self.places.items() if place.saved is not None}
        return {name: MetricsLog(run.folder / "metrics.jsonl").rows() for name, run in runs.items()}

    def listed(self, settings: Sampling, device: str | torch.device, *, hashed: bool) -> list[Column]:
        """Not yet loaded. hashed: whether the weights of policies in memory are hashed, for parts that may be found again."""
        return [
            _column(name, self.places[name], settings, device)
            if name in self.places
            else _live(name, self.policies[name], settings, hashed)
            for name in self.names
        ]


def _measure(
    store: Store, measurement: Measurement, columns: Sequence[Column], processes: Processes, device: str | torch.device,
    progress: bool,
) -> None:  # fmt: skip
    """Makes what is missing."""
    missing = missing_parts(store, measurement, columns)
    processes.wait()  # a process that has begun would change what another finds
    announce, settings = progress and processes.is_main, measurement.settings
    if announce:
        print(_forecast(measurement, columns, missing), flush=True)
    if missing:
        try_judges(measurement.judges, measurement.records, settings.size, settings.fps, device, announce=announce)
    make_parts(store, measurement, missing, processes, progress=progress)


def _read(store: Store, measurement: Measurement, columns: Sequence[Column], trained: frozenset[str]) -> Evaluation:
    read = {column.name: read_column(store, measurement, column.name) for column in columns}
    return Evaluation(
        {name: result for name, (result, _) in read.items()}, trained, {column.name: column.source for column in columns},
        {name: appearance for name, (_, appearance) in read.items()},
    )  # fmt: skip


def _lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    taken = f"another evaluation is under way in {folder}: wait for it, stop it, or choose another output folder"
    return lock_folder(folder, taken)


def _check_names(columns: Mapping[str, Any]) -> None:
    if not columns:
        raise ConfigError("got no columns; expected at least one model")
    for name in columns:
        if not name or not all(letter.isalnum() or letter in "._@-" for letter in name) or name[0] in ".-":
            raise ConfigError(
                f"got the column {name!r}; expected letters, digits, '.', '_', '@' and '-': it names a folder"
            )


def _check_rewards(judges: Sequence[Reward], samples_per_prompt: int) -> None:
    for judge in judges:
        if spec_of(judge).scope != "terminal":
            raise ConfigError(
                f"got the reward {judge.name!r} of scope {spec_of(judge).scope!r}; expected 'terminal', a reward of images"
            )
        if spec_of(judge).groupwise and samples_per_prompt < 2:
            raise ConfigError(
                f"got {samples_per_prompt} sample per prompt with {judge.name!r}, which compares the samples of one prompt; "
                "expected at least 2"
            )


def _column(name: str, place: Place, settings: Sampling, device: str | torch.device) -> Column:
    rows = rows_per_state(place.policy.path, settings.guidance_scale, place.policy.family)
    return Column(name, place.source, place.weights, rows, lambda: place.load(settings, device))


def _live(name: str, policy: Policy, settings: Sampling, hashed: bool) -> Column:
    weights = _own_weights(policy, settings) if hashed else {}
    return Column(name, "a policy in memory", weights, policy.rows_per_state(settings.guidance_scale), lambda: policy)


def _own_weights(policy: Policy, settings: Sampling) -> dict[str, Any]:
    """What decides the images of a policy in memory, as JSON. Not kept: its decoder and encoders, and which of several copies of
    fully trained networks its role calls."""
    levels = policy.sigmas(settings.num_inference_steps, policy.latent_shape(settings.size))
    called = [
        policy.pipeline_setup(),
        policy.pipeline_arguments(settings.guidance_scale, settings.size),
        policy.solver(),
        levels.tolist(),
    ]
    return {"networks": _hash(policy), "call": repr(called)}


def _hash(policy: Policy) -> str:
    whole = sha256()
    for name, network in policy.modules().items():
        whole.update("\n".join(adapter_switches(network)).encode())
        for key, tensor in network.state_dict().items():
            whole.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            whole.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _forecast(measurement: Measurement, columns: Sequence[Column], missing: Missing) -> str:
    """How much there is to make; evaluations of a solver that calls the network once a step."""
    samples, prompts = measurement.samples_per_prompt, len(measurement.records)
    images = len(columns) * prompts * samples
    made = {column.name: 0 for column in columns}
    for column, number in missing:
        made[column.name] += len(measurement.chunk(number)) * samples
    steps = measurement.settings.num_inference_steps
    evaluations = sum(made[column.name] * steps * column.rows for column in columns)
    there = images - sum(made.values())
    return (
        f"{len(columns)} model{'s' * (len(columns) > 1)} × {prompts} prompts × {samples} samples = {images:,} images"
        + (f", {there:,} of them are there" if there else "")
        + f"; {evaluations:,} network evaluations to do ({steps} steps)"
    )
