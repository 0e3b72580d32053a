"""RapidOCR itself, on small drawings (the fakes are elsewhere): exact text, blank pictures, uint8 only, no orphans."""

import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from rewards import OCR, ColorAccuracy, Line, Mix, RapidReader, RewardBatch, score
from rewards.ocr.rapid import Engine, strip
from tests.helpers.reward_parts import in_parts

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
INK, PAPER = (0, 0, 220), (255, 230, 0)


def drawing(text, width=48, height=24, size=18, at=(2, 0), ink=INK):
    picture = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(picture).text(at, text, fill=ink, font=ImageFont.truetype(str(FONT), size))
    return np.asarray(picture)


@pytest.fixture(scope="module")
def reader():
    made = RapidReader(workers=1, timeout=30)
    yield made
    made.close()


WORDS = ["KITE", "LAMP", "QUIZ", "BSRX"]


def batch_of(pictures, words):
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return RewardBatch(prompts=["p"] * len(words), images=images, metadata=[{"target": word} for word in words])


def test_small_drawings_read_exactly(reader):
    output = score(
        OCR(metric="soft", substring_exempt=False, recognizer=reader), batch_of(list(map(drawing, WORDS)), WORDS)
    )
    assert output.info == [f"read {word!r}" for word in WORDS]
    assert output.components["exact"].tolist() == output.components["edit"].tolist() == [1] * 4
    assert (output.scores > 0.9).all() and (output.scores <= 1).all()


def test_wrong_word_and_blank_paper_score_low_but_valid(reader):
    pictures = [drawing("KITE"), drawing(""), np.zeros((24, 48, 3), dtype=np.uint8)]
    output = score(OCR(recognizer=reader, substring_exempt=False), batch_of(pictures, ["KIXE", "KITE", "KITE"]))
    assert output.valid.all() and output.scores[:, 0].tolist() == [0.75, 0, 0]
    assert output.components["soft"][1:].max() < 0.1


def test_batches_chunks_and_mates_do_not_matter(reader):
    pictures = [drawing(word) for word in WORDS] + [drawing("")]
    batch = batch_of(pictures, [*WORDS, "KITE"])
    reward = OCR(metric="soft", recognizer=reader)
    whole = score(reward, batch).scores
    alone = torch.cat([score(reward, part).scores for part in in_parts(batch)])
    assert torch.allclose(whole, alone, atol=1e-5)  # onnxruntime rounds otherwise in another batch size
    order = [4, 2, 0, 1, 3]
    assert torch.allclose(score(reward, batch.select(order)).scores, whole[order], atol=1e-5)


def test_soft_tells_apart_what_reads_alike(reader):
    """A T turns into an X: the reading jumps once, its likelihood falls all the way."""
    blends = [((1 - k) * drawing("KITE") + k * drawing("KIXE")).round().astype(np.uint8) for k in (0, 0.4, 0.45, 0.5)]
    output = score(OCR(metric="soft", recognizer=reader), batch_of(blends, ["KITE"] * 4))
    assert output.components["edit"].tolist() == [1, 1, 0.75, 0.75]
    assert (output.scores[:-1] > 1.1 * output.scores[1:]).all() and output.scores[0] > 0.99


def test_pictures_are_searched_for_lines(reader):
    page = Image.fromarray(drawing("Hello World", 320, 160, 30, at=(20, 15)))
    ImageDraw.Draw(page).text((60, 95), "sale 24", fill=INK, font=ImageFont.truetype(str(FONT), 30))
    blank = drawing("", 320, 160)
    lines, nothing = reader.read(np.stack([np.asarray(page), blank]), "H")
    assert [line.text.replace(" ", "") for line in lines] == ["HelloWorld", "sale24"] and nothing == []
    first = lines[0]
    assert isinstance(first, Line) and first.confidence > 0.8
    assert first.posterior.shape[1] == 2 and first.posterior[:, 1].max() > 0.8  # there is an H
    corners = np.array(first.box)
    assert corners.shape == (4, 2) and 10 <= corners[:, 0].min() <= 30 and corners[:, 1].max() < 70


def test_only_uint8_reaches_the_engine(reader):
    with pytest.raises(TypeError, match="uint8"):
        reader.read(np.zeros((1, 24, 48, 3), dtype=np.float32), "")


def test_closing_ends_the_process_and_reading_goes_on_after_it(reader):
    reader.load()
    (pid,) = reader.pids()
    reader.close()
    assert reader.pids() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert reader.read(drawing("LAMP")[None], "")[0][0].text == "LAMP"


def test_glyphs_ground_truth_scores_one(reader):
    """The metadata of the embedded world is what the rewards' defaults look for, and its renders are read exactly."""
    from flowalign.glyphs.prompts import INKS, PAPERS, train_prompts
    from flowalign.glyphs.renderer import render

    records = train_prompts()[:16]
    batch = RewardBatch(
        prompts=[record["prompt"] for record in records],
        images=render(*([record[key] for record in records] for key in ("target", "ink", "paper"))),
        metadata=[dict(record) for record in records],
    )
    parts = [OCR(metric="exact", fold={"0": "O"}, recognizer=reader), ColorAccuracy(palette=INKS | PAPERS)]
    assert score(Mix(parts, [0.5, 0.5]), batch).scores[:, 0].tolist() == [1] * 16
    quoted = OCR(metric="exact", target="quotes", fold={"0": "O"}, recognizer=reader)
    assert score(quoted, batch).scores[:, 0].tolist() == [1] * 16


def test_the_engine_sees_bgr_in_minus_one_to_one_enlarged_by_repeating():
    engine = Engine.__new__(Engine)  # without its models
    seen = []

    def session(strips):
        seen.append(strips)
        return np.eye(3, dtype=np.float32)[[[0, 2, 2, 0, 1]]]

    engine.session, engine.characters, engine.number = session, ["blank", "a", "b"], {"blank": 0, "a": 1, "b": 2}
    picture = np.zeros((1, 24, 48, 3), dtype=np.uint8)
    picture[..., 0] = 255  # red
    picture[0, 3, 5] = (0, 51, 102)
    header, posteriors = engine({"detect": False, "alphabet": "bx"}, picture)
    assert seen[0].shape == (1, 3, 48, 96) and seen[0].dtype == np.float32
    assert np.allclose(seen[0][0, :, 0, 0], [-1, -1, 1])  # blue, green, red
    assert np.allclose(seen[0][0, :, 6:8, 10:12], np.array([-0.2, -0.6, -1])[:, None, None])
    assert header == {"lines": [[{"text": "ba", "confidence": 1.0, "box": None, "frames": 5}]]}
    assert posteriors.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]  # blank, b, the unknown x


def test_strips_keep_the_aspect_ratio_and_pad_on_the_right():
    page = strip(np.full((20, 50, 3), 255, dtype=np.uint8), min_width=320)
    assert page.shape == (3, 48, 320)
    assert (page[:, :, :120] == 1).all() and (page[:, :, 120:] == 0).all()
    assert strip(np.zeros((96, 400, 3), dtype=np.uint8), 0).shape == (3, 48, 200)


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert RapidReader().count() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert RapidReader().count() == 1
    assert RapidReader(workers=5).count() == 5
