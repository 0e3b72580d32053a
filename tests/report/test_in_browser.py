"""The pages in a real browser: by mouse, by keyboard, on a telephone, without network."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.report.evaluation_page import evaluation_page
from flowalign.report.grids import pairs_grid
from flowalign.report.html import write_report
from flowalign.storage.metrics_log import MetricsLog
from tests.helpers.browser import browser, requests, show
from tests.helpers.evaluation_columns import made_up, metrics_of

pytestmark = pytest.mark.slow
COLUMNS = made_up(("base", "tuned", "other"), 60)
PAIR = made_up(prompts=5)
EDITS = made_up(prompts=5, edits=True)
COLORS = {"base": (200, 20, 30), "tuned": (20, 60, 210)}
VIDEOS = {  # of one color each, and larger than an animated picture may be
    name: replace(
        result, pixels=torch.tensor(COLORS[name], dtype=torch.uint8)[:, None, None].expand(30, 10, 3, 96, 160)
    )
    for name, result in made_up(prompts=30, frames=1, edits=True).items()
}
ROWS = [{"step": step, "reward/ocr_mean": step / 30, "loss/kl": 0.0} for step in range(1, 31)]
LEFT, RIGHT, ESCAPE, ENTER, SPACE, END = "\ue012", "\ue014", "\ue00c", "\ue007", " ", "\ue010"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    clips = made_up(prompts=3, frames=3)
    shown = {
        "three": COLUMNS,
        "pair": PAIR,
        "clips": clips,
        "one": made_up(("base",)),
        "edits": EDITS,
        "videos": VIDEOS,
    }
    for name, columns in shown.items():
        page = evaluation_page(columns, metrics_of(columns, ["ocr"]), title=name, runs={"a": ROWS, "b": ROWS[:20]})
        (folder / f"{name}.html").write_text(page)
    run = folder / "run"
    run.mkdir()
    for row in ROWS:
        MetricsLog(run / "metrics.jsonl").append(row["step"], {k: v for k, v in row.items() if k != "step"})
    pairs_grid(*PAIR.values(), "ocr", run / "grids" / "held_out.png")
    write_report(run)
    moving = folder / "moving"
    pairs_grid(*VIDEOS.values(), "ocr", moving / "grids" / "held_out.png")
    write_report(moving)
    reports = {"report": run / "report.html", "moving": moving / "report.html"}
    return reports | {path.stem: path for path in folder.glob("*.html")}


@pytest.fixture(autouse=True)
def quiet(driver: Any) -> Iterator[None]:
    """No error in the console and nothing asked of the network, whatever a test does."""
    driver.get_log("browser"), requests(driver)
    yield
    assert driver.get_log("browser") == [] and requests(driver) == []


def press(driver: Any, *keys: str) -> None:
    """Into what has the focus."""
    driver.switch_to.active_element.send_keys(*keys)


def click(driver: Any, selector: str) -> None:
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def run(driver: Any, script: str) -> Any:
    return driver.execute_script(f"return {script}")


def until(driver: Any, script: str, expected: Any) -> None:
    """The close of a dialog is told a moment later."""
    for _ in range(100):
        if run(driver, script) == expected:
            return
        time.sleep(0.1)
    assert run(driver, script) == expected


def texts(driver: Any, selector: str) -> list[str]:
    return run(driver, f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent.trim())")


PAGES = ("three", "pair", "clips", "one", "edits", "videos", "report", "moving")


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_it_fits_and_every_image_is_complete(driver: Any, pages: dict[str, Path], name: str, width: int) -> None:
    show(driver, pages[name], width, prefers_color_scheme="dark" if width == 390 else "light")
    assert run(driver, "innerWidth") == width >= run(driver, "document.documentElement.scrollWidth")
    assert run(driver, "[...document.images].length") > 0
    assert run(driver, "[...document.images].every((image) => image.complete && image.naturalWidth > 0 && image.alt)")


def test_tables_are_sorted_by_mouse_and_by_keyboard(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["three"])
    gains = COLUMNS["tuned"].scores["ocr"].nanmean() - COLUMNS["base"].scores["ocr"].mean()
    column = "#results ~ .results tbody td:nth-child(6)"
    click(driver, "#results ~ .results th:nth-child(6) button")
    values = [float(text.replace("−", "-")) for text in texts(driver, column)]
    assert values == sorted(values, reverse=True) and len(values) == 4 and values[0] > float(gains) * 0.9
    press(driver, ENTER)
    assert [float(text.replace("−", "-")) for text in texts(driver, column)] == sorted(values)
    assert run(driver, "document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_prompts_are_ordered_filtered_and_paged(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["three"])
    assert len(texts(driver, ".card")) == 24 and texts(driver, "#place") == ["1–24 of 60"]
    click(driver, "#on")
    click(driver, "#on")
    assert texts(driver, "#place") == ["49–60 of 60"] and run(driver, "document.querySelector('#on').disabled")
    click(driver, "#order option[value=gains]")
    base, tuned = (COLUMNS[name].scores["jpeg"] for name in ("base", "tuned"))
    click(driver, "#by option[value='1']")
    best = COLUMNS["base"].prompts[int((tuned - base).argmax())]
    assert texts(driver, ".card h3")[0] == best
    click(driver, "#order option[value=losses]")
    assert texts(driver, ".card h3")[0] == COLUMNS["base"].prompts[int((tuned - base).argmin())]
    driver.find_element("id", "filter").send_keys("word 7 ")
    assert texts(driver, ".card h3") == ["the word 7 in red"]


def test_a_prompt_is_looked_at_by_keyboard(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["three"])
    run(driver, "document.querySelector('.open').focus()")
    press(driver, ENTER)
    prompt = "document.querySelector('#detail').open && document.querySelector('#detail-prompt').textContent"
    assert run(driver, prompt) == "the word 0 in red" and run(driver, "location.hash") == "#prompt-100"
    press(driver, RIGHT)
    assert run(driver, prompt) == "the word 1 in red"
    press(driver, RIGHT, LEFT)
    assert run(driver, prompt) == "the word 1 in red"
    run(driver, "document.querySelector('#overlay input').focus()")
    press(driver, LEFT, LEFT)  # moves the cut, not on to another prompt
    assert run(driver, prompt) == "the word 1 in red"
    cut = "document.querySelector('.frame').style.getPropertyValue('--cut')"
    assert run(driver, cut) == "48%"
    press(driver, ESCAPE)
    assert run(driver, "document.querySelector('#detail').open") is False
    until(driver, "document.activeElement.closest('.card')?.dataset.name", "101")
    press(driver, RIGHT)
    assert run(driver, "document.activeElement.getAttribute('aria-label')").startswith("tuned: the word 1")


def test_the_cut_is_dragged(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    show(driver, pages["pair"])
    click(driver, ".open")
    frame = driver.find_element("css selector", ".frame")
    driver.execute_script("arguments[0].scrollIntoView()", frame)
    width = frame.size["width"]
    ActionChains(driver).move_to_element(frame).click_and_hold().move_by_offset(width // 4, 0).release().perform()
    assert abs(float(run(driver, "document.querySelector('#overlay input').value")) - 75) <= 1


def test_a_link_leads_to_a_prompt(driver: Any, pages: dict[str, Path]) -> None:
    driver.get("about:blank")
    driver.get(pages["three"].as_uri() + "#prompt-142")
    assert run(driver, "document.querySelector('#detail').open") and texts(driver, "#detail-prompt") == [
        "the word 42 in red"
    ]
    click(driver, "#detail-close")
    until(driver, "document.activeElement.closest('.card')?.dataset.name", "142")  # its page was turned to


def test_curves_tell_their_values(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    for name in ("pair", "report"):
        show(driver, pages[name])
        chart = driver.find_element("css selector", ".chart svg")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
        ActionChains(driver).move_to_element(chart).perform()
        assert texts(driver, ".chart output")[0].startswith("iteration 1")
        run(driver, "document.querySelector('.chart input').focus()")
        press(driver, END, LEFT)
        assert texts(driver, ".chart output")[0].startswith(
            f"iteration 29: {'a ' if name == 'pair' else ''}0.967 (smoothed 0."
        )


def test_pairs_of_a_report_are_laid_over_each_other(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["report"])
    click(driver, ".pairs button")
    press(driver, "\ue004")  # Tab: on to the next pair's button; the slider stands before
    slider = driver.find_element("css selector", ".overlay input")
    slider.send_keys(RIGHT)
    assert run(driver, "document.querySelector('.frame').style.getPropertyValue('--cut')") == "51%"


def test_clips_play_unless_less_motion_is_preferred(driver: Any, pages: dict[str, Path]) -> None:
    kinds = "[...document.querySelectorAll('.card img')].map((each) => each.src.slice(5, 15))"
    show(driver, pages["clips"], prefers_reduced_motion="reduce")
    assert set(run(driver, kinds)) == {"image/png;"}
    click(driver, ".controls .play")
    assert set(run(driver, kinds)) == {"image/webp"}
    show(driver, pages["clips"], prefers_reduced_motion="no-preference")
    assert set(run(driver, kinds)) == {"image/webp"} and "Stop" in texts(driver, ".play")[0]


PLAYED = (
    "[...document.querySelectorAll('video')].filter((each) => each.currentTime > 0 && each.readyState > 1)"
    ".map((each) => [each.videoWidth, each.videoHeight, Math.round(10 * each.duration), each.muted, each.loop].join())"
)


@pytest.mark.parametrize("name", ["videos", "moving"])
def test_videos_play_in_their_size_and_give_their_players_back(driver: Any, pages: dict[str, Path], name: str) -> None:
    show(driver, pages[name], prefers_reduced_motion="reduce")
    assert run(
        driver, "[...document.querySelectorAll('video')].every((each) => !each.hasAttribute('src') && each.poster)"
    )
    show(driver, pages[name], prefers_reduced_motion="no-preference")
    count = run(driver, "document.querySelectorAll('video').length")
    run(driver, "document.querySelector('video').scrollIntoView({block: 'center'})")
    until(driver, f"{PLAYED}.length >= 2", True)
    assert set(run(driver, PLAYED)) == {"320,192,20,true,true"}  # twice as large, 10 frames, 5 a second
    players = run(driver, "document.querySelectorAll('video[src]').length")
    assert 2 <= players < count
    shapes = "[...document.querySelectorAll('video')].map((each) => Math.abs(each.clientWidth / each.clientHeight - 5 / 3) < .1)"
    assert all(run(driver, shapes))  # also those that are not loaded
    last = "[...document.querySelectorAll('video')].at(-1)"
    run(driver, f"{last}.scrollIntoView({{block: 'center'}})")
    until(driver, f"{last}.currentTime > 0", True)
    until(driver, "document.querySelector('video').hasAttribute('src')", False)
    click(driver, ".play")
    assert run(driver, "document.querySelectorAll('video[src]').length") == 0


COLOR = (
    "(() => { const canvas = document.createElement('canvas').getContext('2d'); "
    "canvas.drawImage([...document.querySelectorAll('video')][%d], 0, 0, 8, 8); return [...canvas.getImageData(4, 4, 1, 1).data]; })()"
)


def test_videos_have_their_colors(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["videos"], prefers_reduced_motion="no-preference")
    run(driver, "document.querySelector('video').scrollIntoView({block: 'center'})")
    until(driver, f"{PLAYED}.length >= 2", True)
    for place, color in enumerate(COLORS.values()):
        found = run(driver, COLOR % place)[:3]
        assert max(abs(a - b) for a, b in zip(found, color, strict=True)) <= 10, (found, color)


def test_clips_over_each_other_run_in_step(driver: Any, pages: dict[str, Path]) -> None:
    both = "[...document.querySelectorAll('.frame video')]"
    for name, opener in (("videos", ".open"), ("moving", ".pairs figure > button")):
        show(driver, pages[name], prefers_reduced_motion="no-preference")
        click(driver, opener)
        run(driver, "document.querySelector('.frame').scrollIntoView({block: 'center'})")
        until(driver, f"{both}.length === 2 && {both}.every((each) => each.currentTime > 0.3 && !each.paused)", True)
        assert run(driver, f"Math.abs({both}[0].currentTime - {both}[1].currentTime)") < 0.1
        cut = "getComputedStyle(document.querySelector('.frame').children[1]).clipPath"
        assert run(driver, cut).startswith("inset(0px 0px 0px 50%")


def test_the_source_of_an_edit_stands_before_the_results(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["edits"])
    first = "[...document.querySelector('.card').querySelectorAll('.label')].map((each) => each.textContent)"
    assert run(driver, first) == ["source", "base", "tuned"]
    size = "(({naturalWidth, naturalHeight}) => [naturalWidth, naturalHeight])(document.querySelector('%s img'))"
    assert run(driver, size % ".card") == [48, 12] and run(driver, size % ".card .column + .column") == [24, 12]
    click(driver, ".open")
    click(driver, "#left option[value='-1']")
    assert texts(driver, "#overlay .names span") == ["◂ source", "tuned ▸"]
    assert run(driver, size % "#overlay") == [48, 12]
    press(driver, ESCAPE)
    run(driver, "localStorage.clear()")
    show(driver, pages["edits"])
    click(driver, "#vote-start")
    shown = "document.querySelector('#vote-source img').src"
    before = run(driver, shown)
    press(driver, LEFT)
    assert before.startswith("data:image/png") and run(driver, shown) != before  # of the next prompt
    assert len(texts(driver, ".ballot button")) == 2


SAVED = (
    "Promise.resolve().then(() => new Promise((done) => { const make = URL.createObjectURL; URL.createObjectURL = (blob) => { "
    "blob.text().then(done); return make(blob); }; document.querySelector('#vote-save').click(); }))"
)


def test_a_blind_vote_by_keys_and_mouse(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["pair"])
    run(driver, "localStorage.clear()")
    show(driver, pages["pair"])
    click(driver, "#vote-start")
    assert not any(name in text for text in texts(driver, "#vote") for name in PAIR)  # blind
    assert run(driver, "[...document.querySelectorAll('#vote img')].map((each) => each.alt)") == [
        "the left image",
        "the right image",
    ]
    left, right = (run(driver, f"document.querySelector('#vote-{side} img').src") for side in ("left", "right"))
    prompt = texts(driver, "#vote-prompt")[0]
    press(driver, LEFT)
    press(driver, SPACE)
    press(driver, "0")
    press(driver, "u")
    assert texts(driver, "#vote-count") == ["2 of 5"]
    show(driver, pages["pair"])  # votes survive
    click(driver, "#vote-start")
    assert texts(driver, "#vote-count") == ["2 of 5"]
    click(driver, "#vote-right")
    press(driver, RIGHT)
    press(driver, SPACE)
    assert run(driver, "document.querySelector('#vote').open") is False  # all are voted on
    sentence = texts(driver, "#vote-sentence")[0]
    assert (
        sentence.startswith("tuned against base: ") and "2 ties in 5 votes" in sentence and "95 % interval" in sentence
    )

    lines = [json.loads(line) for line in run(driver, SAVED).splitlines()]
    assert len(lines) == 3 and all(line["chosen_column"] != line["rejected_column"] for line in lines)
    [first] = [line for line in lines if line["prompt"] == prompt]
    data = json.loads(texts(driver, "#data")[0])
    [row] = [row for row in data["rows"] if row["prompt"] == prompt]
    assert row["images"][data["columns"].index(first["chosen_column"])] == left != right
    assert first == {
        "prompt": prompt, "uid": row["uid"], "sample": 0, "seed": 7, "chosen_column": first["chosen_column"],
        "rejected_column": first["rejected_column"], "chosen": f"images/{first['chosen_column']}/{row['uid']}-0.png",
        "rejected": f"images/{first['rejected_column']}/{row['uid']}-0.png",
    }  # fmt: skip
    click(driver, "#vote-anew")
    assert texts(driver, "#vote-start") == ["Vote"]


def test_a_vote_works_where_nothing_may_be_stored(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["pair"])
    forbid = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no'); }})"
    run(driver, f"Boolean({forbid})")
    click(driver, "#vote-start")
    press(driver, LEFT)
    assert texts(driver, "#vote-count") == ["1 of 5"]
    press(driver, ESCAPE)
    until(driver, "document.querySelector('#vote-reveal').disabled", False)
    click(driver, "#vote-reveal")
    assert "in 1 votes" in texts(driver, "#vote-sentence")[0]


def test_votes_for_one_side_have_an_interval_that_ends_at_0(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["pair"])
    run(driver, "localStorage.clear()")
    show(driver, pages["pair"])
    rows = json.loads(texts(driver, "#data")[0])["rows"]
    click(driver, "#vote-start")
    for _ in rows:
        is_base = run(driver, "document.querySelector('#vote-left img').src") in {row["images"][0] for row in rows}
        press(driver, LEFT if is_base else RIGHT)
    sentence = texts(driver, "#vote-sentence")[0]
    assert "0 wins, 5 losses, 0 ties" in sentence and sentence.endswith("95 % interval 0 % to 43 %.")
    click(driver, "#vote-anew")


def test_votes_on_clips_name_their_files(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["clips"])
    click(driver, "#vote-start")
    press(driver, LEFT)
    press(driver, ESCAPE)
    until(driver, "document.querySelector('#vote-reveal').disabled", False)
    click(driver, "#vote-reveal")
    [line] = [json.loads(line) for line in run(driver, SAVED).splitlines()]
    assert line["chosen"] == f"images/{line['chosen_column']}/{line['uid']}-0.webp"
    click(driver, "#vote-anew")
