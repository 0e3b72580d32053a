"""The rule-based judge of Glyphs edits: its numbers, and that they come through EditScore's and PARM's protocols."""

import json
import math
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.config import load_reward
from flowalign.glyphs.edit.judge import Judgment, instruction_in, judge, quality
from flowalign.glyphs.edit.judge_server import GlyphsJudge
from flowalign.glyphs.prompts import Scene
from flowalign.glyphs.renderer import render
from rewards import PARM, ChatEndpoint, EditScore, RewardBatch, score

KITE = Scene("KITE", "red", "white")
LAYER = Path(__file__).parents[2] / "configs" / "rewards" / "edit_score_glyphs.yaml"


def drawn(word: str, ink: str, paper: str, shift: tuple[int, int] = (1, -1)) -> Tensor:
    """To 8 bits, as a PNG has it."""
    return (render([word], [ink], [paper], torch.tensor([shift]))[0] * 255).round() / 255


SOURCE = drawn(*KITE)
HALF = (drawn(*KITE._replace(ink="blue")) + SOURCE) / 2
NOISE = 0.15 * torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
CASES = {  # instruction, result, and what is expected: success, kept, natural, clean
    "ink": ("write it in blue", drawn("KITE", "blue", "white"), (1, 1, 1, 1)),
    "paper": ("put it on a pink background", drawn("KITE", "red", "pink"), (1, 1, 1, 1)),
    "word": ('change the word to "LAMP"', drawn("LAMP", "red", "white"), (1, 1, 1, 1)),
    "not done": ("write it in blue", SOURCE, (0, 1, 1, 1)),
    "half the word": ('change the word to "KIMP"', drawn("KIME", "red", "white"), (0.75, 1, 1, 1)),
    "half the color": ("write it in blue", HALF, (0.5, 1, 1 - math.dist((100, 0, 110), (200, 0, 0)) / 255, 1)),
    "wrong paper": ("write it in blue", drawn("KITE", "blue", "cyan"), (1, 0, 1, 1)),
}  # fmt: skip


def numbers(found: Judgment) -> list[float]:
    return [found.success, found.kept, found.natural, found.clean]


def near(expected: float) -> object:
    return pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("name", CASES)
def test_a_judgment_says_what_was_drawn(name: str) -> None:
    text, result, expected = CASES[name]
    assert numbers(judge(SOURCE, result, f"The instruction: {text}\n")) == [near(number) for number in expected]


def test_a_picture_that_is_moved_or_noisy_is_less_kept_or_clean() -> None:
    blue = drawn("KITE", "blue", "white")
    noise = 0.05 * torch.randn(blue.shape, generator=torch.Generator().manual_seed(0))
    moved, noisy = (
        judge(SOURCE, result, "write it in blue")
        for result in (drawn("KITE", "blue", "white", (0, -1)), (blue + noise).clamp(0, 1))
    )
    assert moved.success == 1 and 0.5 < moved.kept < 0.95 and moved.clean > 0.99
    assert noisy.success > 0.8 and 0.2 < noisy.clean < 0.8 and quality(blue)[1] > 0.99


@pytest.mark.parametrize(
    "text", ["write it in orange", "write it in blue, then write it in red", "", 'change the word to "cat"']
)
def test_a_text_without_one_instruction_is_no_question(text: str) -> None:
    with pytest.raises(ValueError, match=r"got [02] instructions"):
        instruction_in(text)


def test_a_source_that_is_no_picture_of_glyphs_is_refused() -> None:
    for picture, reason in ((torch.rand(3, 24, 48), "picture of Glyphs"), (torch.rand(3, 8, 8), r"\[3, 8, 8\]")):
        with pytest.raises(ValueError, match=reason):
            judge(picture, SOURCE, "write it in blue")


# ---------------------------------------------------------------------------------------- through HTTP


@pytest.fixture(scope="module")
def served():
    with GlyphsJudge() as server:
        yield server


def batch_of(names: list[str]) -> RewardBatch:
    """Only what a policy and its prompts give: no metadata."""
    asked = [CASES[name] for name in names]
    return RewardBatch(
        prompts=[text for text, _, _ in asked], images=torch.stack([result for _, result, _ in asked]),
        conditions=[[SOURCE]] * len(asked),
    )  # fmt: skip


def test_edit_score_gets_the_numbers_of_the_rules_in_its_own_format(served: GlyphsJudge) -> None:
    names = [*CASES]
    reward = load_reward([str(LAYER), f"reward.init_args.endpoint.url={served.url}"])
    assert isinstance(reward, EditScore)
    output = score(reward, batch_of(names))
    found = [judge(SOURCE, CASES[name][1], CASES[name][0]) for name in names]
    torch.testing.assert_close(output.scores[:, 0], torch.tensor([each.overall for each in found]))
    torch.testing.assert_close(
        output.components["prompt_following"] / 10, torch.tensor([each.success for each in found])
    )
    torch.testing.assert_close(output.components["consistency"] / 10, torch.tensor([each.kept for each in found]))
    scores = dict(zip(names, output.scores[:, 0].tolist(), strict=True))
    assert scores["ink"] > scores["half the color"] > scores["not done"] == scores["wrong paper"] == 0
    assert scores["word"] > scores["half the word"] > 0.5


def test_parm_gets_probabilities_of_yes(served: GlyphsJudge) -> None:
    names = ["ink", "half the word", "not done"]
    endpoint = ChatEndpoint(served.url, "glyphs-rules", retries=0)
    expected = [judge(SOURCE, CASES[name][1], CASES[name][0]).overall for name in names]
    for sigma, part in ((0.0, "match"), (0.5, "potential")):
        output = score(PARM(endpoint, sigma=sigma, sources=True), batch_of(names))
        assert output.scores[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        assert output.components[part].tolist() == pytest.approx(expected, abs=1e-5)
    assert output.components["clear"].tolist() == pytest.approx(
        [quality(CASES[name][1])[1] for name in names], abs=1e-5
    )
    unclear = batch_of(["ink"] * 2).select([0])
    unclear.images[0] = (unclear.images[0] + 0.3 * torch.randn(3, 24, 48)).clamp(0, 1)
    output = score(PARM(endpoint, sigma=0.5, sources=True), unclear, max_fail_rate=1.0)
    assert not output.valid.any() and "not clear enough to judge" in output.info[0]


def test_a_sample_without_a_source_is_not_asked_about(served: GlyphsJudge) -> None:
    batch = RewardBatch(prompts=["write it in blue"] * 2, images=torch.stack([SOURCE] * 2), conditions=[[SOURCE], []])
    output = score(PARM(ChatEndpoint(served.url, "m"), sigma=0.0, sources=True), batch)
    assert output.valid[:, 0].tolist() == [True, False] and "no source image" in output.info[1]


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/chat", b"{}", 404, "expected /v1/chat/completions"),
        ("/v1/chat/completions", b"{}", 400, "expected messages"),
        ("/v1/chat/completions", b"[[[", 400, "Expecting"),
        ("/v1/chat/completions", b'{"messages": [{"content": "hello"}]}', 400, "got 0 pictures"),
        ("/v1/chat/completions", b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]}',
         400, "expected data:image/png;base64"),
        ("/v1/chat/completions", b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": '
         b'"data:image/png;base64,AAAA"}}]}]}', 400, "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_with_the_reason(
    served: GlyphsJudge, path: str, body: bytes, status: int, reason: str
) -> None:
    request = urllib.request.Request(served.url.removesuffix("/v1") + path, body)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == status and reason in json.load(error.value)["error"]["message"]
    error.value.close()
