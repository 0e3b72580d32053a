"""Buckets: in which size each prompt is trained, whose turn it is, and a run of a tiny FLUX.1 Kontext with two of them."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowalign.buckets import bucketed, prompts_of_iteration
from flowalign.data import PromptRecord
from flowalign.errors import ConfigError
from flowalign.forecast.footprint import Footprint
from flowalign.media import Size
from flowalign.rollouts.task import Rollout
from flowalign.run.preflight import forecast
from flowalign.trainers import PolicyGradient
from samplers import Chain, FlowSDE
from samplers.noise import generator
from tests.helpers.families import subject
from tests.helpers.family_run import configured, trained

WIDE, TALL, SQUARE, USUAL = Size(32, 64), Size(64, 32), Size(48, 48), Size(48, 48)


def record(height: int, width: int, /, uid: int = 0, **metadata: Any) -> PromptRecord:
    return PromptRecord(uid, f"prompt {uid}", metadata, (Image.new("RGB", (width, height)),))


def sized(*counts: int) -> list[PromptRecord]:
    """So many prompts of each of some sizes, mixed."""
    sizes = [size for size, count in enumerate(counts) for _ in range(count)]
    order = generator(7, "mixed").permutation(len(sizes)).tolist()
    return [PromptRecord(uid, f"{uid}", size=Size(8 + sizes[place], 8)) for uid, place in enumerate(order)]


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        (record(300, 900), WIDE), (record(900, 300), TALL), (record(100, 120), SQUARE),
        (record(100, 142), WIDE),  # 1.42 is nearer to 2 than to 1 by the ratio of the two, not by the difference
        (record(100, 141), SQUARE), (record(300, 900, height=90, width=30), TALL),
        (record(300, 900, height="90", width="30"), TALL), (PromptRecord(0, "no image"), USUAL),
    ],
)  # fmt: skip
def test_a_prompt_goes_where_the_aspect_ratio_is_nearest(prompt: PromptRecord, size: Size) -> None:
    assert bucketed([prompt], [WIDE, TALL, SQUARE], USUAL)[0].size == size


def test_area_and_frames_choose_among_equal_ratios() -> None:
    sizes = [Size(32, 32), Size(64, 64), Size(64, 64, 5), Size(32, 64, 5)]
    asked = [{"height": 60, "width": 60}, {}, {"frames": 5}, {"frames": 5, "height": 30, "width": 64}]
    records = [PromptRecord(uid, "a", metadata) for uid, metadata in enumerate(asked)]
    assert [each.size for each in bucketed(records, sizes, Size(64, 64))] == [sizes[1], sizes[1], sizes[2], sizes[3]]
    assert (
        bucketed([record(700, 700)], sizes, Size(64, 64))[0].size == sizes[0]
    )  # the first: a photo says nothing of area


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"height": 30}, "expected both height and width, or neither"),
        ({"height": 30, "width": "wide"}, "width='wide'; expected a whole number from 1"),
        ({"frames": 0}, "frames=0; expected a whole number"),
        ({"frames": 9}, r"for 9 frames; expected one of \[1\], those of rollout.buckets"),
    ],
)
def test_a_size_that_is_none_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"got the prompt 'prompt 0'.*{message}"):
        bucketed([record(8, 8, **metadata)], [WIDE, SQUARE], USUAL)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([[32]], r"got \[32\] in rollout.buckets; expected \[height, width\]"),
        ([[48, 48], [0, 32]], r"got \[0, 32\]"),
        ([[48, 48], [48, 48, 1]], "expected different sizes"),
        ([[32, 64]], r"the policy's \[48, 48, 1\] among them, which is that of evaluations"),
    ],
)
def test_buckets_that_are_none_are_refused(buckets: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rollout(Chain(), FlowSDE(), buckets=buckets).sizes(USUAL)
    assert Rollout(Chain(), FlowSDE(), buckets=[[48, 48, 1], [8, 8]]).sizes(USUAL) == [USUAL, Size(8, 8)]


def test_without_sizes_the_order_is_that_of_earlier_versions() -> None:
    records = [PromptRecord(uid, f"{uid}") for uid in range(7)]
    for iteration in (0, 1, 5, -1):
        positions = range(3 * iteration, 3 * iteration + 3)
        expected = [int(generator(4, "data", p // 7).permutation(7)[p % 7]) for p in positions]
        assert [each.uid for each in prompts_of_iteration(records, 3, 4, iteration)] == expected


@pytest.mark.parametrize("counts", [(9, 6), (1, 5), (4, 4, 4), (2, 7, 3)])
def test_an_iteration_is_of_one_bucket_and_an_epoch_has_each_prompt_once(counts: tuple[int, ...]) -> None:
    """`count` epochs of the whole set are as many iterations as it has prompts."""
    records, count, total = sized(*counts), 3, sum(counts)
    batches = [prompts_of_iteration(records, count, 5, iteration) for iteration in range(total)]
    assert all(len({each.size for each in batch}) == 1 and len(batch) == count for batch in batches)
    turns = Counter(batch[0].size for batch in batches)
    assert [turns[Size(8 + bucket, 8)] for bucket in range(len(counts))] == list(counts)
    for bucket, own in enumerate(counts):
        uids = [each.uid for batch in batches for each in batch if each.size == Size(8 + bucket, 8)]
        epochs = [uids[start : start + own] for start in range(0, len(uids), own)]
        assert len(epochs) == count and all(len(set(epoch)) == own for epoch in epochs)
    for first in range(1, total):  # spread evenly: never more than one turn off
        found = Counter(batch[0].size for batch in batches[:first])
        assert all(abs(found[Size(8 + b, 8)] - first * own / total) <= 1 for b, own in enumerate(counts))


def test_turns_go_on_in_the_next_period_and_before_the_first() -> None:
    records = sized(2, 4)
    batches = [prompts_of_iteration(records, 2, 5, iteration) for iteration in range(-3, 6)]
    assert [batch[0].size for batch in batches[:3]] == [batch[0].size for batch in batches[3:6]]
    own = [[each.uid for each in batch] for batch in batches if batch[0].size == Size(8, 8)]
    assert len(own) == 3 and all(len(set(uids)) == 2 for uids in own)


# ------------------------------------------------------------------------------------------ a run


def arguments(folder: Path) -> list[str]:
    """Prompts with wide and tall sources in a row of three to two, and a wide one that is evaluated."""
    for name, sides in (("wide", (100, 60)), ("tall", (60, 100))):
        Image.effect_noise(sides, 80).save(folder / f"{name}.png")
    rows = [{"prompt": f"a word {n}", "image": f"{'tall' if n in (1, 3) else 'wide'}.png"} for n in range(5)]
    (folder / "mixed.json").write_text(json.dumps(rows))
    (folder / "wide.json").write_text(json.dumps(rows[:1]))
    return [
        f"prompts={folder / 'mixed.json'}", f"evaluation.prompts={folder / 'wide.json'}", "evaluation.count=1",
        "policy.height=32", "policy.width=64", "rollout.buckets=[[32, 64], [64, 32]]", "run.iterations=3",
    ]  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Size | None], tuple[int, ...]]]:
    """Of each iteration that is run: the sizes of its prompts, and the shape of its latents."""
    collect, found = PolicyGradient.collect, list[tuple[list[Size | None], tuple[int, ...]]]()

    @wraps(collect)
    def noted(self: PolicyGradient, records: Sequence[PromptRecord], iteration: int, *others: Any) -> Any:
        batch = collect(self, records, iteration, *others)
        found.append(([each.size for each in records], tuple(batch.forest.states.shape[1:])))
        return batch

    monkeypatch.setattr(PolicyGradient, "collect", noted)
    return found


def test_a_tiny_kontext_trains_in_two_buckets(tmp_path: Path, seen: list[Any]) -> None:
    family = subject("flux1_kontext")
    wide, tall = (family.policy().latent_shape(size) for size in (WIDE, TALL))
    row, _ = trained(family, tmp_path, *arguments(tmp_path))
    assert seen == [([WIDE] * 2, wide), ([TALL] * 2, tall), ([WIDE] * 2, wide)] and wide != tall
    assert row["cost/rollout_per_image"] == 3  # as forecast, for any size


@pytest.mark.slow
def test_a_run_with_buckets_resumes_bit_equal(tmp_path: Path, seen: list[Any]) -> None:
    family, own, folders = subject("flux1_kontext"), arguments(tmp_path), (tmp_path / "whole", tmp_path / "parts")
    for folder in folders:
        folder.mkdir()
    row, weights = trained(family, folders[0], *own)
    trained(family, folders[1], *own, "run.iterations=2")
    again, resumed = trained(family, folders[1], *own)
    assert seen[3:] == seen[:3] and again["reward/brightness_mean"] == row["reward/brightness_mean"]
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_largest_bucket_is_what_must_fit(tmp_path: Path) -> None:
    family = subject("flux1_kontext")
    one, several = (
        configured(family, tmp_path, *arguments(tmp_path), *more)[0]
        for more in ([], ["rollout.buckets=[[32, 64], [64, 32], [96, 64]]"])
    )
    assert "buckets: 32×64 with 3 prompts, 64×32 with 2 prompts" in forecast(one)
    assert several.largest_size == Size(96, 64) and Footprint(several).latent == 3 * Footprint(one).latent
    assert [each.size for each in several.largest_prompts()] == [Size(96, 64)] * 2  # 0.6 is nearer to 2/3 than to 1/2


def test_what_a_run_cannot_do_with_buckets_is_refused(tmp_path: Path) -> None:
    family, own = subject("flux1_kontext"), arguments(tmp_path)
    refused = {
        f"evaluation.prompts={tmp_path / 'mixed.json'} evaluation.count=5": "got 2 of the 5 prompts of evaluation.prompts=.* 32×64",
        "rollout.buckets=[[32,64],[33,64]]": "got image size 33×64; expected positive multiples",
        "rollout.buckets=[[32,64],[64,32,5]]": "got 5 frames for a model of images",
        "rollout.buckets=[[64,32]]": "expected different sizes, the policy's",
    }
    for overrides, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            configured(family, tmp_path, *own, *overrides.split())
