"""Files of image pairs and of labeled images: what is read, and that every defect is said with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowalign.data import PromptRecord
from flowalign.image_sets import check_images_of, check_not_held_out, digest_of, load_labeled, load_pairs
from flowalign.media import source_image

HEIGHT, WIDTH = 4, 6
VOTE = {
    "prompt": "a cat", "uid": 3, "sample": 0, "seed": 7, "chosen": "images/b/3-0.png", "rejected": "images/a/3-0.png",
    "chosen_column": "b", "rejected_column": "a",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of columns a and b for the uids 3 and 4."""
    for number, name in enumerate(("a/3-0", "b/3-0", "a/4-0", "b/4-0")):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 10, 20)).save(path)
    return tmp_path


def write(folder: Path, *rows: Any, name: str = "preferences.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_votes_are_read_as_the_page_saves_them(folder: Path) -> None:
    other = {**VOTE, "prompt": "a dog", "uid": 4, "chosen": "images/a/4-0.png", "rejected": "images/b/4-0.png"}
    first, second = load_pairs(write(folder, VOTE, "", other))
    assert first.files == (folder / "images/b/3-0.png", folder / "images/a/3-0.png")
    metadata = {"uid": 3, "sample": 0, "seed": 7, "chosen_column": "b", "rejected_column": "a"}
    assert first.record == PromptRecord(0, "a cat", metadata)
    assert (second.record.uid, second.record.prompt, second.chosen.name) == (1, "a dog", "4-0.png")
    assert second.place.endswith("preferences.jsonl, line 3")
    check_images_of([first, second], HEIGHT, WIDTH)


def test_labeled_images_are_read_with_the_sources_of_an_edit(folder: Path) -> None:
    rows = [
        {"prompt": "a cat", "image": "images/a/3-0.png"},
        {"prompt": "a cat", "image": "images/b/3-0.png", "negative_prompt": "blur"},
        {"prompt": "make it blue", "image": "images/a/3-0.png", "images": ["images/a/4-0.png"], "from": "us"},
    ]
    found = load_labeled(write(folder, *rows))
    assert [each.image.parent.name for each in found] == ["a", "b", "a"] and found[0].files == (found[0].image,)
    assert found[0].record.images == () and found[1].record.negative_prompt == "blur"
    assert found[2].record.images == (source_image(folder / "images/a/4-0.png"),) and found[2].record.metadata == {
        "from": "us"
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "images/b/4-0.png", "rejected": "images/a/4-0.png"}, "line 2: got .*non-empty text under 'prompt'"),
        ({**VOTE, "prompt": " "}, "line 2: got .*non-empty text under 'prompt'"),
        ({**VOTE, "chosen": ""}, "line 2: got '' under 'chosen'; expected the path of an image"),
        ({"prompt": "a", "chosen": "images/b/4-0.png"}, "line 2: got None under 'rejected'"),
        ({**VOTE, "chosen": 3}, "line 2: got 3 under 'chosen'"),
        ({**VOTE, "rejected": "images/c.png"}, "line 2: the rejected image .*c.png does not exist .*from the folder"),
        ({**VOTE, "rejected": "images"}, "line 2: the rejected image .*images is a folder without files"),
        ({**VOTE, "image": "images/a/4-0.png"}, "line 2: got 'image' beside 'chosen'; expected .* 'images'"),
        ({**VOTE, "prompt": "a dog", "rejected": VOTE["chosen"]}, "line 2: got .*one image; expected two: leave ties out"),
        (VOTE, "line 2: got the pair of images of line 1 again"),
        ({**VOTE, "chosen": VOTE["rejected"], "rejected": VOTE["chosen"]}, "line 2: got the pair .* line 1 again"),
        ("[1]", "line 2: got list; expected a JSON object"),
        ('{"prompt": ', "line 2: not JSON"),
    ],
    ids=str,
)  # fmt: skip
def test_a_defect_of_a_pair_is_said_with_its_line(folder: Path, row: Any, said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_pairs(write(folder, VOTE, row))


def test_two_files_of_one_image_are_no_pair(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / VOTE["chosen"]).read_bytes())
    with pytest.raises(ValueError, match="one image; expected two"):
        load_pairs(write(folder, {**VOTE, "rejected": "copy.png"}))


def test_an_image_of_a_prompt_stands_there_once(folder: Path) -> None:
    row = {"prompt": "a cat", "image": "images/a/3-0.png"}
    with pytest.raises(ValueError, match="line 2: got the image of this prompt of line 1 again"):
        load_labeled(write(folder, row, row))


def test_files_that_are_none(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist"):
        load_pairs(str(folder / "missing.jsonl"))
    with pytest.raises(ValueError, match="holds no rows"):
        load_pairs(write(folder, ""))
    with pytest.raises(ValueError, match=r"votes.txt'; expected a .jsonl"):
        load_labeled("votes.txt")


def test_sizes_are_checked_and_nothing_is_resized(folder: Path) -> None:
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(folder / "wide.png")
    (folder / "broken.png").write_text("no image")
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (shade, 0, 0)) for shade in (0, 99)]
    frames[0].save(folder / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    good = {"prompt": "a cat", "image": "images/a/3-0.png"}
    for name, said in (
        ("wide.png", rf"line 2: got .*wide.png of {HEIGHT}×{WIDTH + 1} pixels; expected {HEIGHT}×{WIDTH}, the policy's"),
        ("broken.png", r"line 2: got .*broken.png, which cannot be read \(it has no format"),
        ("clip.webp", "line 2: got .*clip.webp, a clip of 2 frames; expected an image, as policy.frames says"),
    ):  # fmt: skip
        rows = load_labeled(write(folder, good, {"prompt": "a dog", "image": name}, {"prompt": "a cow", "image": name}))
        check_images_of(rows[:1], HEIGHT, WIDTH)
        with pytest.raises(ValueError, match=said):
            check_images_of(rows, HEIGHT, WIDTH)


def test_prompts_that_are_evaluated_are_refused(folder: Path) -> None:
    pairs = load_pairs(write(folder, VOTE))
    check_not_held_out(pairs, [PromptRecord(0, "a dog"), PromptRecord(1, "a cat", images=(folder,))])
    with pytest.raises(
        ValueError, match=r"line 1: got the prompt 'a cat', which is among .*allow_training_prompts=true"
    ):
        check_not_held_out(pairs, [PromptRecord(0, "a dog"), PromptRecord(7, "a cat")])


def test_the_digest_is_of_contents(folder: Path) -> None:
    before = digest_of(load_pairs(write(folder, VOTE)))
    (folder / "b.png").write_bytes((folder / VOTE["chosen"]).read_bytes())
    assert digest_of(load_pairs(write(folder, {**VOTE, "chosen": "b.png", "sample": 2}))) == before
    swapped = {**VOTE, "chosen": VOTE["rejected"], "rejected": VOTE["chosen"]}
    assert digest_of(load_pairs(write(folder, swapped))) != before
    Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(folder / VOTE["chosen"])
    assert digest_of(load_pairs(write(folder, VOTE))) != before
