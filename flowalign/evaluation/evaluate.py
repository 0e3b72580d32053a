"""Evaluation: images of the deterministic sampler on fixed prompts and seeds, and their scores.

The initial noise is a function of (seed, prompt uid, sample) alone: base and tuned model start from the same.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from flowalign.data import PromptRecord, Sources, as_records, digest, source_images
from flowalign.distributed.processes import Processes
from flowalign.media import read_image
from flowalign.models.base import Policy, Sampling, Size
from flowalign.models.sampling import Job, in_batches, settle
from rewards import FunctionReward, Reward, RewardBatch, RewardError, labels_of, pictures, score
from samplers import Schedule

if TYPE_CHECKING:
    import pandas

IMAGE_BYTES = 64 * 2**20  # of the pictures that a result keeps


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Scores and pictures of one evaluation. N images or videos, sample-major: every prompt's first sample, then every second
    one, …

    scores {reward: float64 [N]}, nan where the reward was not valid; pixels uint8 [N, 3, h, w], of videos [N, F, 3, h, w]:
    height and width are reduced by a whole factor if all of them would be more than IMAGE_BYTES; fps: frames per second of
    videos; digest: of the prompts with their metadata (`flowalign.data.digest`); sources {uid: uint8 [3, h, w']}: the source images
    of each prompt of an edit beside each other, as high as `pixels`."""

    uids: list[int]
    prompts: list[str]
    scores: dict[str, Tensor]
    pixels: Tensor
    seed: int
    num_inference_steps: int
    guidance_scale: float
    evaluations_per_image: float
    seconds: float
    digest: str = ""
    fps: float | None = None
    sources: dict[int, Tensor] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        """`pixels` as fp32 in [0, 1]."""
        return self.pixels.float() / 255

    @property
    def first_frames(self) -> Tensor:
        """uint8 [N, 3, h, w]: the images, or the first frame of each video."""
        return self.pixels if self.pixels.ndim == 4 else self.pixels[:, 0]

    @property
    def samples(self) -> list[int]:
        """Which of its prompt's samples each image is; 0 is the first."""
        return [number // len(set(self.uids)) for number in range(len(self.uids))]

    def to_pandas(self) -> pandas.DataFrame:
        """A row per image: uid, prompt, sample (0 is a prompt's first) and a column per reward, nan = not valid. ImportError
        without pandas, which flowalign does not install."""
        scores = {name: values.numpy() for name, values in self.scores.items()}
        return as_frame({"uid": self.uids, "prompt": self.prompts, "sample": self.samples, **scores})


def as_frame(table: dict[str, Any]) -> pandas.DataFrame:
    """The columns of a table as a frame. ImportError without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas, which is not installed: pip install pandas") from error
    return pandas.DataFrame(table)


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: str | Sequence[str | PromptRecord],
    rewards: Sequence[Reward | Callable[..., Any] | str],
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    size: Size | None = None,
    schedule: Schedule | None = None,
    fps: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    images: Sources | None = None,
    samples_per_prompt: int = 1,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> EvaluationResult:
    """Generates every prompt `samples_per_prompt` times by the policy's solver (never with SDE noise) and scores the images.

    prompts: texts or records. images: source images of an edit, see `flowalign.data.with_images`. rewards: also functions of (images, prompts), or their paths, see `rewards.FunctionReward`.
    num_inference_steps, guidance_scale, size, schedule, fps: None is as `policy.sampling` says. Uses the weights as they are:
    wrap the call in `policy.role("reference")` for the base, in `ema.applied()` for the average. Scores do not depend on
    `batch_size` beyond rounding; a groupwise reward gets all samples of a prompt at once, however small that is.
    `progress(n)` is called after each batch of n. A reward of several channels is
    reported as several, `reward/channel`. A reward that fails, or gives no score for more than half of the images, is a
    RewardError; one sample without a score is nan. `processes` share the images, and each returns the whole result."""
    records, judges = as_records(prompts, images), as_rewards(rewards)
    check_request(records, judges, batch_size, samples_per_prompt)
    settings = settle(
        policy.sampling, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, size=size, schedule=schedule,
        fps=fps,
    )  # fmt: skip
    everyone = processes or Processes()
    began, rows_before = time.monotonic(), policy.evaluations
    count, unit = samples_per_prompt * len(records), made_together(judges, samples_per_prompt)
    jobs, first, back = _shared_out(records, samples_per_prompt, unit, everyone)
    batch_size = max(unit, batch_size // unit * unit)
    kept: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {label: [] for reward in judges for label in labels_of(reward)}
    for made, scored in generate_and_score(policy, jobs, judges, settings, seed, batch_size, first):
        for name, part in scored.items():
            scores[name].append(part)
        kept.append(kept_pixels(made, count))
        if progress is not None:
            progress(len(made))
    pixels = everyone.gather(torch.cat(kept))[back]
    complete = {name: everyone.gather(torch.cat(parts))[back] for name, parts in scores.items()}
    _check_valid(complete)
    return EvaluationResult(
        uids=[record.uid for record in records] * samples_per_prompt,
        prompts=[record.prompt for record in records] * samples_per_prompt,
        scores=complete,
        pixels=pixels,
        seed=seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        evaluations_per_image=everyone.total(policy.evaluations - rows_before) / count,
        seconds=time.monotonic() - began,
        digest=digest(records),
        fps=settings.fps,
        sources=kept_sources(records, pixels.shape[-2]),
    )


def _shared_out(
    records: Sequence[PromptRecord], samples: int, unit: int, everyone: Processes
) -> tuple[list[Job], int, Tensor]:
    """(this process's jobs, the number of the first of them among all, [N] what puts the images of all into the result's order: all
    prompts, then all prompts again, …). unit: as many images are made together, by one process. ValueError if one would have none."""
    numbers = torch.arange(samples * len(records)).reshape(samples, len(records))
    order = (numbers.T if unit > 1 else numbers).flatten()
    jobs = [(records[number % len(records)], number // len(records)) for number in order.tolist()]
    if len(jobs) // unit < everyone.count:
        raise ValueError(
            f"got {len(jobs) // unit} images (or groups of them) for {everyone.count} processes; expected at least one for each: "
            "add prompts or samples"
        )
    share = everyone.share(len(jobs) // unit)
    return jobs[share.start * unit : share.stop * unit], share.start * unit, order.argsort()


def made_together(judges: Sequence[Reward], samples_per_prompt: int) -> int:
    """How many images are made together: all samples of a prompt if a reward compares them."""
    return samples_per_prompt if any(reward.spec.groupwise for reward in judges) else 1


def generate_and_score(
    policy: Policy, jobs: Sequence[Job], judges: Sequence[Reward], settings: Sampling, seed: int, batch_size: int, first: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:  # fmt: skip
    """Batch by batch the images [n, 3, H, W] of the jobs (videos [n, F, 3, H, W]), fp32 in [0, 1], and their scores {label:
    float64 [n]}, nan = not valid. first: the number of the first job among those of all processes."""
    for batch, latents, images in in_batches(policy, jobs, settings, seed, batch_size):
        yield images, _score(judges, [record for record, _ in batch], images, latents, settings.fps, first)
        first += len(batch)


def as_rewards(rewards: Sequence[Reward | Callable[..., Any] | str]) -> list[Reward]:
    """Rewards as they are; functions, and paths of functions, as rewards."""
    if callable(rewards) or isinstance(rewards, str):
        raise TypeError(f"got {rewards!r} as the rewards; expected a list of them: put it into brackets")
    return [
        FunctionReward(each) if isinstance(each, str) or inspect.isroutine(each) else cast(Reward, each)
        for each in rewards
    ]


def kept_pixels(images: Tensor, count: int) -> Tensor:
    """uint8 on the CPU, of height and width reduced so far that `count` of them fit into IMAGE_BYTES."""
    factor = max(1, math.ceil(math.sqrt(count * images[0].numel() / IMAGE_BYTES)))
    factor = min(factor, *images.shape[-2:])
    small = avg_pool2d(images.float().flatten(0, -4), factor)
    return (small.clamp(0, 1) * 255).round().to(torch.uint8).cpu().reshape(*images.shape[:-2], *small.shape[-2:])


def kept_sources(records: Sequence[PromptRecord], height: int) -> dict[int, Tensor]:
    """{uid: uint8 [3, height, w]}: a prompt's source images beside each other, each in its own aspect ratio."""
    return {
        record.uid: torch.cat([_of_height(read_image(image), height) for image in record.images], 2)
        for record in records
        if record.images
    }


def _of_height(image: Tensor, height: int) -> Tensor:
    size = (height, max(1, round(image.shape[2] * height / image.shape[1])))
    fitted = interpolate(image[None], size, mode="bilinear", antialias=True)[0] if image.shape[1] != height else image
    return (fitted.clamp(0, 1) * 255).round().to(torch.uint8)


def check_request(prompts: Sequence[PromptRecord], rewards: Sequence[Reward], batch_size: int, samples: int) -> None:
    """ValueError for what cannot be evaluated."""
    names, uids = [label for reward in rewards for label in labels_of(reward)], [record.uid for record in prompts]
    if not prompts or not rewards or batch_size < 1 or samples < 1:
        raise ValueError(
            f"evaluate got {len(prompts)} prompts, {len(rewards)} rewards, batch_size={batch_size}, "
            f"samples_per_prompt={samples}; expected at least 1 of each"
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"got rewards {names}; expected different names, or scores would overwrite each other: give each its own `name`"
        )
    if len(set(uids)) < len(uids):
        raise ValueError("got two prompts with one uid, hence the same noise; use samples_per_prompt to repeat prompts")


def _score(
    rewards: Sequence[Reward],
    records: list[PromptRecord],
    images: Tensor,
    latents: Tensor,
    fps: float | None,
    first: int,
) -> dict[str, Tensor]:
    """{reward: float64 [n]}, a reward of several channels as `reward/channel`; nan = not valid. How many may fail is judged
    over all images, not batch by batch."""
    batch = RewardBatch(
        prompts=[record.prompt for record in records],
        metadata=[record.metadata for record in records],
        sample_ids=list(range(first, first + len(records))),
        group_ids=[record.uid for record in records],
        conditions=source_images(records, latents.device),
        latents=latents,
        sigma=latents.new_zeros(len(latents)),
        **pictures(images, fps),
    )
    outputs = [(reward, score(reward, batch, max_fail_rate=1.0)) for reward in rewards]
    return {
        label: column.double()
        for reward, output in outputs
        for label, column in zip(labels_of(reward), output.scores.T, strict=True)
    }


def _check_valid(scores: dict[str, Tensor]) -> None:
    for name, values in scores.items():
        failed = int(values.isnan().sum())
        if 2 * failed > len(values):
            raise RewardError(
                f"reward {name!r} could not score {failed} of {len(values)} images; expected at most half: mend it, then "
                "evaluate"
            )
