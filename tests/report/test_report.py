"""The report: self-contained, complete, and able to describe a run that has hardly begun."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.report.grids import grid
from flowalign.report.html import write_report
from flowalign.report.panels import reward_panels
from flowalign.storage.metrics_log import MetricsLog
from tests.helpers.html_page import problems

CAPTIONS = ['the word "KITE" in red\nocr 0.25 → 1', "<script>alert('x')</script> & more\nocr 0.5 → not valid"]


def images(seed=0, size=(24, 48), count=2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, *size, generator=generator) * 255).round() / 255


def log_iterations(run, count):
    log = MetricsLog(run / "metrics.jsonl")
    for step in range(1, count + 1):
        log.append(step, {
            "reward/ocr_mean": step / 9, "reward/ocr_std": 0.1, "reward/jpeg_mean": -step, "reward/jpeg_std": 0.2,
            "reward/mean": 0.3, "group/zero_std_ratio": 0.5, "ratio/drift_max": 0.0, "ratio/clip_fraction": 0.1,
            "ratio/approx_kl": 1e-6, "loss/policy": -0.01, "loss/kl": 0.0, "optim/lr": 3e-4,
            "optim/grad_norm": float("nan") if step == 2 else 0.3, "cost/rollout_per_image": 10.0,
            "time/rollout": 1.0, "time/decode": 0.25, "time/reward": 0.5, "time/update": 2.0, "time/iteration": 4.0,
        })  # fmt: skip


def summary_of(base, tuned, intervals):
    gain = {name: tuned[name] - base[name] for name in base}
    figures = {"pairs": 64, "wins": 30, "losses": 14, "ties": 20, "dropped": 0, "unscored_base": 0, "unscored_tuned": 0}
    counts = {count: dict.fromkeys(base, value) for count, value in figures.items()}
    return {
        "reward": next(iter(base)),
        "rewards": {"base": base, "tuned": tuned, "gain": gain, "gain_ci95": intervals, **counts},
        "seconds": 3725,
        "evaluations_per_image": {"rollout": 10, "update": 2.5},
        "ratio_drift_max": 3e-7,
        "pipeline": {
            "load": "DiffusionPipeline.from_pretrained('some/model')",
            "setup": [],
            "arguments": {"num_inference_steps": 10, "guidance_scale": 1.5},
        },
    }


def make_run(folder):
    run = folder / "my-run"
    (run / "lora").mkdir(parents=True)
    log_iterations(run, 3)
    (run / "config.yaml").write_text("seed: 7\nnote: <b>bold</b>\n")
    (run / "provenance.json").write_text(json.dumps({"git_commit": "abc123", "versions": {"torch": "2.15"}}))
    intervals = {"ocr": [0.125, 0.375], "jpeg": None}
    summary = summary_of({"ocr": 0.5, "jpeg": 3.0}, {"ocr": 0.75, "jpeg": 2.5}, intervals)
    (run / "summary.json").write_text(json.dumps(summary))
    grid(images(0), images(1), CAPTIONS, run / "grids" / "step-9.png")
    grid(images(2), images(3), CAPTIONS, run / "grids" / "step-10.png")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def page_of(run):
    return write_report(run).read_text()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def picture_of(data):
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def embedded(page, kind):
    return [base64.b64decode(data) for data in re.findall(rf'src="data:image/{kind};base64,([^"]+)"', page)]


# -------------------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_that_loads_nothing(run, page):
    assert problems(page) == []
    assert len(re.findall("<script", page)) == 1  # the page's own, which its policy names
    assert page.count('<figure class="chart"') == 2  # two rewards, all else is constant
    assert not list(run.glob(".*"))  # no temporary file is left


def test_what_never_moves_is_said_in_words(page):
    text = text_of(page)
    assert "All rewards together: 0.3 in all 3 iterations" in text
    assert "KL loss to the reference: 0 in all 3 iterations" in text
    assert "Gradient norm: 0.3 in 2 of 3 iterations, not a number in the others" in text


def test_the_table_states_base_tuned_gain_and_interval(page):
    text = text_of(page)
    assert "ocr 0.5 0.75 +0.25 +0.125 to +0.375 better 30 / 14 / 20" in text
    assert "jpeg 3 2.5 −0.5 –" in text  # no interval, no verdict
    assert "1 h 02 min" in text and "3e-07" in text
    assert "per image, rollout 10" in text and "per image, update 2.5" in text and "3 training iterations" in text


@pytest.mark.parametrize(
    ("interval", "verdict"), [([0.1, 0.2], "better"), ([-0.2, -0.1], "worse"), ([-0.1, 0.2], "no clear change")]
)
def test_the_verdict_follows_the_interval(tmp_path, interval, verdict):
    (tmp_path / "summary.json").write_text(json.dumps(summary_of({"ocr": 1.0}, {"ocr": 1.1}, {"ocr": interval})))
    text = text_of(page_of(tmp_path))
    assert re.search(rf"ocr 1 1\.1 \+0\.1 \S+ to \S+ {verdict}", text)


def test_every_reward_has_a_line(tmp_path):
    summary = summary_of({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": [0.5, 1.5], "b": [-1.5, -0.5]})
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = text_of(page_of(tmp_path))
    assert "a 1 2 +1 +0.5 to +1.5 better 30 / 14 / 20 b 2 1 −1 −1.5 to −0.5 worse" in text


def test_held_out_scores_that_few_rows_hold_have_their_own_curve(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 9):
        log.append(step, {"reward/mean": 0.4} | ({"eval/ocr": 0.1 * step} if step % 4 == 0 else {}))
    assert [panel.title for panel in reward_panels(log.rows())] == ["All rewards together", "Held-out ocr"]
    page = page_of(tmp_path)
    assert page.count('<figure class="chart"') == 1 and "All rewards together: 0.4 in all 8 iterations" in page


def test_it_says_how_the_run_was_made_and_how_to_load_the_lora(run, page):
    assert "git_commit abc123 versions torch 2.15" in text_of(page)
    assert "seed: 7\nnote: &lt;b&gt;bold&lt;/b&gt;" in page
    snippet = re.search(r"<pre>(import torch.*?)</pre>", page, re.S).group(1)
    snippet = html.unescape(snippet)
    compile(snippet, "snippet", "exec")
    assert f"pipe.load_lora_weights('{run / 'lora'}')" in snippet
    assert "from_pretrained('some/model')" in snippet and "guidance_scale=1.5," in snippet


def test_prompts_cannot_inject_markup(page):
    assert "&lt;script&gt;alert" in page and "the word &#34;KITE&#34; in red" in page


def test_the_newest_grid_is_shown_pair_by_pair_with_its_own_pixels(page):
    tiles = [np.asarray(picture_of(data)) for data in embedded(page, "png")]
    expected = [picture for pair in zip(images(2), images(3), strict=True) for picture in pair]  # step 10, not step 9
    assert len(tiles) == 4
    for tile, picture in zip(tiles, expected, strict=True):
        assert tile.shape == (24 * 6, 48 * 6, 3)
        np.testing.assert_array_equal(tile[3::6, 3::6], (picture * 255).round().byte().permute(1, 2, 0).numpy())


def test_pairs_are_shown_by_why_they_were_chosen(tmp_path):
    groups = ["largest gains", "drawn by chance"]
    grid(images(0), images(1), CAPTIONS, tmp_path / "grids" / "held_out.png", groups)
    page = page_of(tmp_path)
    first, second = page.index("<h3>Largest gains</h3>"), page.index("<h3>Drawn by chance</h3>")
    assert first < page.index("ocr 0.25 → 1") < second < page.index("ocr 0.5 → not valid")


def test_a_summary_of_something_else_is_named(tmp_path):
    for content in ('{"rewards": {"base": {}}}', '{"rewards": 3}', '{"seconds": {}}'):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(ValueError, match=r"summary\.json, .* without what a run writes"):
            write_report(tmp_path)


def test_the_newest_tree_is_shown(tmp_path):
    run = make_run(tmp_path)
    assert "<h2>Rollout</h2>" not in write_report(run).read_text()
    (run / "trees").mkdir()
    for number, color in ((9, "red"), (10, "blue")):
        Image.new("RGB", (4, 3), color).save(run / "trees" / f"iteration-{number}.png")
    shown = re.search(r'data:image/png;base64,([^"]+)" alt="tree', write_report(run).read_text()).group(1)
    assert base64.b64decode(shown) == (run / "trees" / "iteration-10.png").read_bytes()


def test_equal_folders_give_equal_pages(run, page):
    assert page_of(run) == page


@pytest.mark.parametrize("iterations", [0, 1])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path, iterations):
    log_iterations(tmp_path, iterations)
    text = text_of(page_of(tmp_path))
    assert "No evaluation was run." in text and "no config.yaml" in text and "Use what was trained" not in text
    assert ("No training iteration was logged." in text) == (iterations == 0)
    assert f"{iterations} training iteration" in text


def test_one_iteration_of_one_reward_is_said(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").append(1, {"reward/mean": 0.4})
    assert "All rewards together: 0.4 in the only iteration" in text_of(page_of(tmp_path))


def test_a_torn_last_metric_is_left_out_and_a_damaged_file_is_named(tmp_path):
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert "3 training iterations" in page_of(run)
    before = (run / "report.html").read_bytes()
    (run / "summary.json").write_text('{"base": ')
    with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


# --------------------------------------------------------------------------------------------- the grid


def test_a_grid_enlarges_tiny_images_by_whole_pixels_and_reduces_huge_ones(tmp_path):
    path = grid(images(), images(1), CAPTIONS, tmp_path / "grids" / "a.png")
    entry = json.loads((path.parent / "grids.json").read_text())["a.png"][0]
    assert entry["caption"] == CAPTIONS[0] and entry["base"][2:] == [288, 144]
    x, y, width, height = entry["tuned"]
    tile = np.asarray(picture_of(path.read_bytes()))[y : y + height, x : x + width]
    np.testing.assert_array_equal(tile, tile[::6, ::6].repeat(6, 0).repeat(6, 1))  # blocks of 6 × 6, no smoothing
    huge = grid(images(size=(800, 600)), images(1, size=(800, 600)), CAPTIONS, tmp_path / "grids" / "b.png")
    entries = json.loads((path.parent / "grids.json").read_text())
    assert set(entries) == {"a.png", "b.png"} and entries["b.png"][0]["base"][2:] == [300, 400]
    assert picture_of(huge.read_bytes()).width <= 1240


def test_long_captions_stay_inside_the_grid(tmp_path):
    captions = ["a very long prompt indeed, " * 12 + "\nocr 0 → 1"] * 2
    path = grid(images(), images(1), captions, tmp_path / "long.png")
    picture = np.asarray(picture_of(path.read_bytes()))
    assert (picture[:, -4:] == 255).all() and (picture[-4:] == 255).all()  # a white margin: nothing runs off


def test_images_that_do_not_pair_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 captions; expected equal shapes"):
        grid(images(), images(count=3), CAPTIONS, tmp_path / "g.png")
    with pytest.raises(ValueError, match="1 captions"):
        grid(images(), images(), CAPTIONS[:1], tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()


def test_a_reward_may_be_called_anything(tmp_path):
    for step in (1, 2):
        MetricsLog(tmp_path / "metrics.jsonl").append(step, {"reward/$x^{$_mean": 1.0, "reward/<b>'\"_mean": step})
    page = page_of(tmp_path)
    assert "<b>" not in page and problems(page) == []


def test_a_misspelt_folder_is_an_error_and_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
