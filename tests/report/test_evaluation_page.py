"""The page of an evaluation, as a file: complete, safe with any text, and made of the figures it was given."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from flowalign.report.evaluation_page import evaluation_page, figure, verdict
from flowalign.report.picture_urls import picture_urls
from tests.helpers.evaluation_columns import Columns, made_up, metrics_of
from tests.helpers.html_page import problems

HOSTILE = ("</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "<!-- 日本 \u2028 {{ x }} & 😀")
ROWS = [{"step": step, "reward/ocr_mean": step / 9, "loss/kl": 0.0} for step in range(1, 31)]


def page_of(columns: Columns, **given: Any) -> str:
    return evaluation_page(columns, metrics_of(columns, given.pop("trained", ["ocr"])), title="try", **given)


def data_of(page: str) -> dict[str, Any]:
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert content is not None
    return json.loads(content.group(1))


def lines_of(page: str, label: str = "rewards") -> list[list[str]]:
    """The texts of a table's cells, its head first."""
    table = re.search(rf'<table class="sortable" aria-label="{label}">(.*?)</table>', page, re.S)
    assert table is not None
    lines = re.findall(r"<tr>(.*?)</tr>", table.group(1), re.S)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line)] for line in lines]


def picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("given", [
    {}, {"names": ("base",)}, {"names": ("base", "a", "b")}, {"frames": 3}, {"samples": 2}, {"prompts": 1},
    {"prompts": HOSTILE, "names": ("base", *HOSTILE), "rewards": HOSTILE},
])  # fmt: skip
def test_it_is_one_valid_file_that_loads_nothing(given: dict[str, Any]) -> None:
    columns = made_up(**given)
    rewards = list(columns["base"].scores)
    metrics, runs = metrics_of(columns, rewards[:1]), dict.fromkeys(columns, ROWS)
    first, again = (evaluation_page(columns, metrics, title="try", runs=runs) for _ in range(2))
    assert problems(first) == [] and first == again


def test_hostile_texts_arrive_as_they_are_and_as_text() -> None:
    columns = made_up(("base", *HOSTILE), HOSTILE, HOSTILE)
    page = page_of(columns, trained=HOSTILE[:1])
    data = data_of(page)
    assert data["columns"] == ["base", *HOSTILE] and data["rewards"] == list(HOSTILE)
    assert [row["prompt"] for row in data["rows"]] == list(HOSTILE)
    assert len(re.findall("<script", page)) == 2 and "<img src=x" not in page and "alert(1)</script>" not in page


def test_the_data_are_the_scores_and_the_very_pixels() -> None:
    columns = made_up(("base", "tuned"), 5, samples=2)
    rows = data_of(page_of(columns))["rows"]
    assert [(row["uid"], row["sample"]) for row in rows[4:6]] == [(104, 0), (100, 1)]
    assert rows[3]["scores"][1][0] is None  # nan
    for place, row in enumerate(rows):
        for column, result in enumerate(columns.values()):
            np.testing.assert_array_equal(
                np.asarray(picture(row["images"][column])), result.pixels[place].permute(1, 2, 0).numpy()
            )
            known = [float(scores[place]) for scores in result.scores.values()]
            assert row["scores"][column] == [None if math.isnan(s) else pytest.approx(s, rel=1e-5) for s in known]


def test_a_column_may_list_its_rewards_in_another_order() -> None:
    columns = made_up()
    tuned = columns["tuned"]
    turned = replace(tuned, scores=dict(reversed(tuned.scores.items())))
    assert data_of(page_of(columns | {"tuned": turned}))["rows"] == data_of(page_of(columns))["rows"]


def test_the_tables_state_what_metrics_json_says() -> None:
    columns = made_up()
    metrics = metrics_of(columns, ["ocr"])
    metrics["gain"]["tuned"] = {
        "ocr": {"gain": 0.25, "ci95": [0.125, 0.375], "win_rate": 0.75, "wins": 20, "losses": 5, "ties": 4, "pairs": 29, "dropped": 1},
        "jpeg": {"gain": -0.5, "ci95": [-0.75, -0.25], "win_rate": 0.1, "wins": 3, "losses": 27, "ties": 0, "pairs": 30, "dropped": 0},
    }  # fmt: skip
    metrics["diversity"] = {"base": {"pixels": 0.25}, "tuned": {"pixels": 1.25}}
    metrics["monitors"] = {
        "base": {"saturation": 0.5, "contrast": None},
        "tuned": {"saturation": -0.5, "contrast": None},
    }
    for name, means in {"base": (0.5, 1000.0), "tuned": (0.75, None)}.items():
        metrics["mean"][name] = dict(zip(("ocr", "jpeg"), means, strict=True))
    page = evaluation_page(columns, metrics, title="try")
    assert lines_of(page)[1:] == [
        ["ocr", "trained", "tuned", "0.500", "0.750", "+0.250", "+0.125 to +0.375", "75 %", "20 / 5 / 4", "better"],
        ["jpeg", "held out", "tuned", "1000.000", "–", "−0.500", "−0.750 to −0.250", "10 %", "3 / 27 / 0", "worse"],
    ]
    assert "tuned against base: better on ocr (trained); worse on jpeg (held out)." in page
    assert "fell on jpeg: look for reward hacking" in page and "ocr: 1 of 30 pairs of tuned could not be scored" in page
    assert lines_of(page, "diversity and monitors")[1:] == [
        ["pixels", "diversity", "0.250", "1.250"], ["saturation", "hacking monitor", "0.500", "−0.500"],
        ["contrast", "hacking monitor", "–", "–"],
    ]  # fmt: skip
    assert lines_of(page, "settings")[1:] == [
        ["base", "6", "1.000", "6.000", "a model"], ["tuned", "6", "2.000", "6.000", "a model"],
    ]  # fmt: skip


def test_one_column_has_its_means_and_no_vote() -> None:
    page = page_of(made_up(("base",)))
    assert (
        lines_of(page)[0] == ["reward", "mean", "95 % interval"] and 'id="vote"' not in page and 'id="left"' not in page
    )


def test_verdicts() -> None:
    assert (
        verdict({"ci95": [0.1, 0.2], "pairs": 3}) == "better" and verdict({"ci95": [-0.2, -0.1], "pairs": 3}) == "worse"
    )
    assert verdict({"ci95": [0.0, 0.2], "pairs": 3}) == "no clear change"
    assert verdict({"ci95": None, "pairs": 1}) == "too few prompts to say"
    assert verdict({"ci95": None, "pairs": 0}) == "no valid pair"


@pytest.mark.parametrize(("value", "sign", "text"), [
    (0.5, "", "0.500"), (-0.5, "+", "−0.500"), (0.5, "+", "+0.500"), (0.0, "+", "+0.000"), (1e-5, "", "1e-05"),
    (-1e-5, "", "−1e-05"), (123456.0, "", "1.235e+05"), (6, "", "6"),
])  # fmt: skip
def test_figures(value: float, sign: str, text: str) -> None:
    assert figure(value, sign) == text


def test_without_script_the_first_prompts_are_there() -> None:
    page = page_of(made_up(prompts=30))
    cards = page[page.index('id="cards"') : page.index('id="back"')]
    assert cards.count("<article") == 8 and cards.count('<img src="data:image/png') == 16


def test_curves_of_several_runs_and_what_never_moves() -> None:
    columns = made_up(prompts=2)
    page = page_of(columns, runs={"a": ROWS, "b": ROWS[:20]})
    assert page.count('<figure class="chart"') == 1 and page.count('class="keys"') == 1
    assert "KL loss to the reference: in a, 0 in all 30 iterations; in b, 0 in all 20 iterations" in page


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_reduced_until_they_fit() -> None:
    pixels = [made_up(prompts=12, size=(96, 192))[name].pixels for name in ("base", "tuned")]
    full = picture_urls(pixels, 8.0)
    assert (full.factor, full.lossless, full.tiny) == (1, True, False)
    sizes = {}
    for budget in (1_200_000, 700_000, 200_000):
        fitted = picture_urls(pixels, 8.0, budget)
        total = sum(len(url) for urls in fitted.stills for url in urls)
        assert total <= budget and picture(fitted.stills[0][0]).size == (192 // fitted.factor, 96 // fitted.factor)
        sizes[budget] = (fitted.factor, fitted.lossless)
    assert sizes[700_000] == (1, False) and sizes[200_000] == (2, False)
    assert picture_urls(pixels, 8.0, 1).factor == 2  # not below 48 pixels, whatever the budget


def test_videos_are_clips_with_their_first_frame() -> None:
    columns = made_up(prompts=2, frames=3, size=(16, 32))
    urls = picture_urls([each.pixels for each in columns.values()], 5.0)
    clip = picture(urls.clips[1][0])
    assert clip.format == "WEBP" and clip.n_frames == 3  # type: ignore[attr-defined]
    clip.load()
    assert clip.info["duration"] == 200
    frames = columns["tuned"].pixels[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(np.array(picture(urls.stills[1][0])), frames[0])
    for number, frame in enumerate(frames):
        clip.seek(number)
        np.testing.assert_array_equal(np.array(clip.convert("RGB")), frame)  # without loss


def test_larger_videos_are_mp4_and_smaller_where_they_must_fit() -> None:
    pixels = [each.pixels for each in made_up(prompts=2, frames=3, size=(96, 160)).values()]
    urls = picture_urls(pixels, 5.0)
    kind, _, content = urls.clips[1][0].partition(";base64,")
    assert kind == "data:video/mp4" and not urls.tiny
    with av.open(io.BytesIO(base64.b64decode(content))) as container:
        assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [(192, 320)] * 3
        assert container.streams.video[0].average_rate == 5
    fitted = picture_urls(pixels, 5.0, 1_000)
    assert fitted.tiny and picture(fitted.clips[0][0]).size == (80, 48) and not fitted.lossless


def test_the_source_of_an_edit_is_there_once_a_prompt() -> None:
    columns = made_up(prompts=3, samples=2, edits=True)
    data = data_of(page_of(columns))
    assert list(data["sources"]) == ["100", "101", "102"]
    np.testing.assert_array_equal(np.array(picture(data["sources"]["101"])), np.full((12, 48, 3), 1))
    page = page_of(columns)
    cards = page[page.index('id="cards"') : page.index('id="back"')]
    assert cards.index('class="label">source') < cards.index('class="label">base') and "n3" in cards[:60]
    assert data_of(page_of(made_up()))["sources"] == {} and 'class="label">source' not in page_of(made_up())


def test_clips_run_as_fast_as_they_were_made() -> None:
    columns = {name: replace(result, fps=20.0) for name, result in made_up(prompts=1, frames=3).items()}
    [row] = data_of(page_of(columns))["rows"]
    for url in row["clips"]:
        clip = picture(url)
        clip.load()  # the duration of a frame is known once it is read
        assert clip.info["duration"] == 50
