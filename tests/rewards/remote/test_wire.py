"""The wire format: every bit comes back, and bytes that are no message are refused before anything is made of them."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rewards import RewardBatch, RewardOutput
from rewards.remote import wire
from rewards.remote.wire import (
    Limits,
    TooLarge,
    WireError,
    decode_batch,
    decode_output,
    encode_batch,
    encode_output,
)
from tests.helpers.remote_rewards import mixed_batch, same


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def batches() -> dict[str, RewardBatch]:
    numbers = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 4, 5, generator=numbers)
    odd = images.clone()
    odd[0, 0, 0] = torch.tensor([-0.0, 1.5, torch.nan, -torch.inf, 1e-40])
    prompts, sigma = ["a", "", "\N{SNOWMAN}"], torch.tensor([0.0, 0.5, 1.0])
    return {
        "prompts only": RewardBatch(prompts=prompts),
        "empty": RewardBatch(prompts=[], images=torch.zeros(0, 3, 4, 5)),
        "floats": mixed_batch(),
        "odd floats": RewardBatch(prompts=prompts, images=odd),
        "doubles": RewardBatch(prompts=prompts, images=images.double()),
        "not contiguous": RewardBatch(prompts=prompts, images=images.transpose(2, 3)),
        "bytes": RewardBatch(prompts=prompts, images=(images * 255).to(torch.uint8)),
        "videos": RewardBatch(prompts=prompts, videos=torch.rand(3, 2, 3, 4, 5, generator=numbers), fps=7.5),
        "latents": RewardBatch(
            prompts=prompts, latents=torch.randn(3, 4, 2, generator=numbers).bfloat16(), sigma=sigma
        ),
        "conditions": RewardBatch(prompts=prompts, conditions=[[images[0], images[1][:, :2]], [], [images[2]]]),
    }


@pytest.mark.parametrize("name", batches())
def test_every_bit_of_a_batch_comes_back(name: str) -> None:
    batch = batches()[name]
    back = decode_batch(encode_batch(batch))
    for field in ("prompts", "metadata", "sample_ids", "group_ids", "fps"):
        assert vars(back)[field] == vars(batch)[field]
    pairs = list(zip(batch.tensors().values(), back.tensors().values(), strict=True))
    for ours, other in zip(batch.conditions or [], back.conditions or [], strict=True):
        pairs += zip(ours, other, strict=True)
    for left, right in pairs:
        if left is None:
            assert right is None
        else:
            assert (left.dtype, left.shape, bits(left)) == (right.dtype, right.shape, bits(right))
    assert (batch.conditions is None) == (back.conditions is None)


def test_pictures_of_eight_bits_take_a_byte_a_value() -> None:
    floats, eight = len(encode_batch(batches()["doubles"])), len(encode_batch(batches()["bytes"]))
    assert eight < floats - 3 * 3 * 4 * 5 * 6


def test_it_is_a_file_of_safetensors() -> None:
    read = safetensors.torch.load(encode_batch(batches()["latents"]))
    assert bits(read["latents"]) == bits(batches()["latents"].latents)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_every_bit_of_an_output_comes_back(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    scores[0] = torch.nan
    parts = {"a/b": torch.tensor([1.0, -0.0, torch.nan, 2.0]), "": torch.zeros(4)}
    output = RewardOutput(scores, ~scores.isnan(), parts, ["x", "", "\n", "ü"], 0.0, scores.abs(), ("a", "b"))
    same(decode_output(encode_output(output), 4), output)
    bare = decode_output(encode_output(RewardOutput(scores, ~scores.isnan())), 4)
    assert bare.components == {} and bare.info == [] and bare.uncertainty is None


def changed(message: bytes, change: Any) -> bytes:
    """A message with another header; `change` gets the header and the content."""
    length = int.from_bytes(message[:8], "little")
    header = json.loads(message[8 : 8 + length])
    content = json.loads(header["__metadata__"]["content"])
    change(header, content)
    header["__metadata__"]["content"] = json.dumps(content)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + message[8 + length :]


def test_rows_in_another_order_are_put_in_order_and_lost_ones_are_an_error() -> None:
    scores = torch.tensor([10.0, 11.0, 12.0])
    message = encode_output(RewardOutput(scores, scores > 0, {"c": scores}, ["0", "1", "2"]))
    output = decode_output(changed(message, lambda header, content: content.update(rows=[2, 0, 1])), 3)
    assert output.scores.tolist() == output.components["c"].tolist() == [11, 12, 10] and output.info == ["1", "2", "0"]
    for rows in ([0, 1, 1], [0, 1], [0, 1, 3], [0, 1, 2, 3], None, [0, 1, "2"]):
        with pytest.raises(WireError):
            decode_output(changed(message, lambda header, content, rows=rows: content.update(rows=rows)), 3)
    for count in (2, 4):
        with pytest.raises(WireError, match=rf"expected {count}, each row once"):
            decode_output(message, count)


HARMFUL: list[tuple[str, Any]] = [
    ("another version", lambda h, c: h["__metadata__"].update(protocol="flowalign-reward/2")),
    ("another kind", lambda h, c: h["__metadata__"].update(kind="output")),
    ("no metadata", lambda h, c: h.update(__metadata__={"content": ""})),
    ("a type that is not in the list", lambda h, c: h["images"].update(dtype="F8_E4M3")),
    ("an object type", lambda h, c: h["images"].update(dtype="O")),
    ("a shape that needs more bytes", lambda h, c: h["images"].update(shape=[2**30, 3, 2**20, 2**20])),
    ("a shape that overflows", lambda h, c: h["images"].update(shape=[2**63, 2**63])),
    ("a negative shape", lambda h, c: h["images"].update(shape=[-6, 3, 12, -8])),
    ("a shape of floats", lambda h, c: h["images"].update(shape=[6.0, 3, 12, 8])),
    ("offsets elsewhere", lambda h, c: h["images"].update(data_offsets=[8, 6920])),
    ("no offsets", lambda h, c: h["images"].pop("data_offsets")),
    ("a tensor that is none", lambda h, c: h.update(images="/etc/passwd")),
    ("a tensor too many", lambda h, c: h.update(weights={"dtype": "F32", "shape": [0], "data_offsets": [6912, 6912]})),
    ("prompts that are no texts", lambda h, c: c.update(prompts=[1] * 6)),
    ("too few prompts", lambda h, c: c.update(prompts=["a"])),
    ("metadata that is none", lambda h, c: c.update(metadata=["x"] * 6)),
    ("conditions that are not there", lambda h, c: c.update(conditions=[1, 0, 0, 0, 0, 0])),
    ("a billion conditions", lambda h, c: c.update(conditions=[10**9] * 6)),
    ("fps without videos", lambda h, c: c.update(fps=float("nan"))),
    ("fps that is a text", lambda h, c: c.update(fps="__import__('os')")),
]


@pytest.mark.parametrize("change", [change for _, change in HARMFUL], ids=[name for name, _ in HARMFUL])
def test_a_header_that_lies_is_refused(change: Any) -> None:
    with pytest.raises(WireError):
        decode_batch(changed(encode_batch(mixed_batch()), change))


def test_a_message_that_is_cut_or_has_more_is_refused() -> None:
    message = encode_batch(RewardBatch(prompts=["p"], images=torch.rand(1, 3, 2, 2)))
    for end in [*range(0, len(message), 7), len(message) - 1]:
        with pytest.raises(WireError):
            decode_batch(message[:end])
    with pytest.raises(WireError):
        decode_batch(message + b"x")


def test_garbage_is_refused() -> None:
    deep = b"[" * 100_000
    for garbage in (b"", b"\0" * 64, os.urandom(999), b"\xff" * 64, struct.pack("<Q", len(deep)) + deep):
        with pytest.raises(WireError):
            decode_batch(garbage)
        with pytest.raises(WireError):
            decode_output(garbage, 1)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(total_bytes=100), "bytes; expected at most 100"),
        (Limits(header_bytes=50), "a header of .* expected at most 50"),
        (Limits(samples=5), "got 6 samples; expected at most 5"),
        (Limits(pixels=95), "images .*expected at most 95 pixels"),
    ],
)
def test_limits_hold_before_a_tensor_is_made(limits: Limits, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_tensor", lambda *arguments: pytest.fail("made"))
    with pytest.raises(TooLarge, match=said):
        decode_batch(encode_batch(mixed_batch()), limits)


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    payload = pickle.dumps(Harm(tmp_path / "harmed"))
    for message in (payload, struct.pack("<Q", len(payload)) + payload, encode_batch(mixed_batch()) + payload):
        with pytest.raises(WireError):
            decode_batch(message)
        with pytest.raises(WireError):
            decode_output(message, 1)
    assert not (tmp_path / "harmed").exists()
    pickle.loads(payload)
    assert (tmp_path / "harmed").exists()  # it would have


@pytest.mark.parametrize("value", [torch.zeros(2), {1: "a"}, float("nan"), {"a": [object()]}, b"x"])
def test_metadata_that_json_does_not_keep_is_refused_and_named(value: object) -> None:
    with pytest.raises(WireError, match=r"metadata\[0\]\['extra'\].*expected texts, finite numbers"):
        encode_batch(RewardBatch(prompts=["p"], metadata=[{"extra": value}]))
