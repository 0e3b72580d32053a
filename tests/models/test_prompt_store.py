"""Encoded prompts: once each, bounded, and the same bits whenever they are encoded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowalign.data import PromptRecord, as_records, digest
from flowalign.models import Conditions, Size, load_policy
from flowalign.models.prompt_store import PromptStore

WORDS = ["KITE", "MOON", "LAMP", "ROSE"]


def store_of(limit: int) -> tuple[PromptStore, list[str]]:
    """A store of rows of 8 bytes, and the list of what was encoded."""
    calls: list[str] = []

    def encode(record: PromptRecord, size: Size | None, negative: bool) -> Conditions:
        calls.append(record.prompt)
        return Conditions({"length": torch.tensor([[float(len(record.prompt)), len(record.images)]])})

    return PromptStore(encode, limit), calls


def test_the_least_recently_used_are_dropped_and_encoded_again() -> None:
    store, calls = store_of(16)  # two rows
    a, b, c = as_records(["a", "bb", "ccc"])
    store.conditions([a, b], None, False)
    store.conditions([a, a], None, False)  # a was used last
    assert store.conditions([c, b, a], None, False).tensors["length"][:, 0].tolist() == [3, 2, 1]
    assert calls == ["a", "bb", "ccc", "bb", "a"] and store.encoded == 5
    assert [record.prompt for record in store.missing([a, b, c], None, False)] == ["ccc"]


def test_a_batch_larger_than_the_bound_is_served() -> None:
    store, calls = store_of(0)
    records = as_records(["a", "bb", "a"])
    assert store.conditions(records, None, False).tensors["length"][:, 0].tolist() == [1, 2, 1] and calls == ["a", "bb"]
    store.conditions(records, None, False)
    assert calls == ["a", "bb"] * 2


def test_images_make_another_record_metadata_does_not() -> None:
    store, calls = store_of(1000)
    record = PromptRecord(0, "a", {"target": 1})
    store.conditions(
        [record, PromptRecord(1, "a", {"target": 2}), PromptRecord(2, "a", images=(Path("x.png"),))], None, False
    )
    assert len(calls) == 2


def test_a_policy_that_keeps_nothing_gives_the_bits_of_one_that_keeps_all(tiny_pipeline: Path) -> None:
    keeps, forgets = (load_policy(str(tiny_pipeline), trainable="none", prompt_store=size) for size in (2**30, 0))
    first = keeps.encode(as_records(WORDS), negative=True)
    forgets.encode(as_records(WORDS[::-1]))
    again = forgets.encode(as_records(WORDS), negative=True)
    assert first.negative is not None and again.negative is not None
    for mine, other in ((first, again), (first.negative, again.negative)):
        assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)
    assert keeps.encoded == 5 and forgets.encoded == 4 + 4 + 1  # the negative prompt is one record


def test_together_is_one_batch_that_is_not_kept(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Any = load_policy(str(tiny_pipeline), trainable="none")
    batches: list[int] = []
    encode = policy.model.encode

    def counted(records: Any, *how: Any) -> Conditions:
        batches.append(len(records))
        return encode(records, *how)

    monkeypatch.setattr(policy.model, "encode", counted)
    policy.encode(as_records(WORDS), negative=True, together=True)
    policy.encode(as_records(WORDS[:2]))
    assert batches == [4, 4, 1, 1] and policy.encoded == 2


def test_a_records_own_negative_prompt_comes_before_the_policys(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none", negative_prompt="a word")
    plain, own = PromptRecord(0, "KITE"), PromptRecord(1, "KITE", negative_prompt="MOON")
    negative = policy.encode([plain, own], negative=True).negative
    expected = policy.encode(as_records(["a word", "MOON"]))
    assert negative is not None and torch.equal(negative.tensors["embeds"], expected.tensors["embeds"])


def test_guidance_without_negatives_and_mixed_conditions_are_refused(tiny_pipeline: Path) -> None:
    policy = load_policy(str(tiny_pipeline), trainable="none")
    bare, full = policy.encode(as_records(WORDS[:1])), policy.encode(as_records(WORDS[:1]), negative=True)
    x, sigma = torch.zeros(1, 3, 24, 48), torch.tensor([0.5])
    with pytest.raises(ValueError, match=r"encode\(records, negative=True\)"):
        policy.velocity(x, sigma, bare, guidance_scale=2.0)
    with pytest.raises(ValueError, match="expected all or none"):
        Conditions.cat([bare, full])
    assert torch.equal(policy.velocity(x, sigma, bare), policy.velocity(x, sigma, full))


def test_the_source_image_is_content_not_place(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path, color in zip(paths, ("red", "red", "blue"), strict=True):
        Image.new("RGB", (2, 2), color).save(path)
    same, moved, other = (digest([PromptRecord(0, "a", images=(path,))]) for path in paths)
    assert same == moved != other
