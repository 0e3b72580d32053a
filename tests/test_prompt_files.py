"""Prompt files and public prompt sets in the exact layouts of their repositories, a few rows of each."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowalign import prompt_sets
from flowalign.config import load_config
from flowalign.data import PromptRecord, load_prompts
from flowalign.errors import ConfigError
from rewards.geneval.clauses import parse

TINY = str(Path(__file__).parent / "data" / "tiny.yaml")
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"G I G G L E" painted in thick letters\tIllustrations\tWriting & Symbols\t\n'
)
UNIGENBENCH = (
    "index,prompt_en,sub_dims_en\n"
    '0,"A fox, in ink.","{""Subjects"": ""Animal"", ""Testpoints"": [""Style"", ""\\""quoted\\""""]}"\n'
    '1,Two pandas,"{""Subjects"": ""Animal"", ""Testpoints"": []}"\n'
)
VBENCH = (
    'prompt,prompt_shorter,prompt_zh\n"In a still frame,\na stop sign",a stop sign,停车标志\na toilet,a toilet,厕所\n'
)
GENEVAL = (
    '{"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], '
    '"prompt": "a photo of two cows"}\n'
    '{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "blue"}], "prompt": "a photo of a blue cow"}\n'
)
DRAWBENCH = "A red colored car.\nA horse riding an astronaut.\n" * 5


def loaded(folder: Path, name: str, content: str, prefix: str = "") -> list[PromptRecord]:
    (folder / name).write_text(content, encoding="utf-8")
    return load_prompts(f"{prefix}{folder / name}")


def paths(record: PromptRecord) -> tuple[Path, ...]:
    return tuple(image.file for image in record.images)


@pytest.fixture
def any_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set a few rows will do."""
    few = {name: replace(each, counts=()) for name, each in prompt_sets.PROMPT_SETS.items()}
    monkeypatch.setattr("flowalign.data.PROMPT_SETS", few)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "id,prompt,n\n7,a cat,\n", ("a cat", {"id": "7", "n": ""})),
        ("a.csv", '\ufeffprompt,note\r\n"a ""big"", red cat",x\r\n\r\n', ('a "big", red cat', {"note": "x"})),
        ("a.csv", ",prompt\n0,a cat\n", ("a cat", {})),  # the unnamed index that pandas writes
        ("a.csv", 'prompt\n"one\ntwo"\n', ("one\ntwo", {})),
        ("a.tsv", 'prompt\tnote\n"a" cat, red\tx\n', ('"a" cat, red', {"note": "x"})),
        ("a.json", '["a cat"]', ("a cat", {})),
        ("a.json", '[\n {"id": "005695-0057", "prompt": "a cat"}\n]', ("a cat", {"id": "005695-0057"})),
        ("a.jsonl", '{"prompt": "a cat", "clue": 30}\n', ("a cat", {"clue": 30})),
    ],
)
def test_a_file_is_read_by_its_suffix(name: str, content: str, expected: tuple[str, Any], tmp_path: Path) -> None:
    (record,) = loaded(tmp_path, name, content)
    assert (record.prompt, record.metadata) == expected and record.uid == 0 and record.negative_prompt is None


def test_a_table_may_name_an_image_and_a_negative_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    one, two = loaded(tmp_path, "a.csv", "prompt,image,negative_prompt\na,a.png,dark\nb,,\n")
    assert (paths(one), one.negative_prompt) == ((tmp_path / "a.png",), "dark")
    assert (two.images, two.negative_prompt, two.metadata) == ((), None, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,n\na,1\n\nb\n", r"a\.csv, line 4: got 1 cells; expected 2, those of \['prompt', 'n'\]"),
        ("a.csv", 'prompt,n\n"a\nb",1\nc,2,3\n', r"a\.csv, line 4: got 3 cells"),
        ("a.csv", 'prompt\n"a" b\n', r"a\.csv, line 2: not a table \(.*\); expected cells with quotes closed"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv, line 1: got the column 'prompt' twice"),
        (
            "a.csv",
            "words;n\na;1\n",
            r"a\.csv, line 2: got \{'words;n': 'a;1'\}; expected a non-empty text under 'prompt' or",
        ),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.tsv", "prompt\tn\na b\n", r"a\.tsv, line 2: got 1 cells"),
        ("a.json", '{"prompt": "a"}', r"a\.json: got dict; expected a list of texts or objects"),
        ("a.json", '["a", 3]', r"a\.json, entry 2: got 3; expected a text or an object"),
        ("a.json", '["a", ""]', r"a\.json, entry 2: got .*; expected a non-empty text"),
        (
            "a.json",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            r"a\.json: not JSON .*; a file with .* is a \.jsonl: rename it",
        ),
        (
            "a.jsonl",
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n",
            "a Git-LFS pointer; .*lfs pull",
        ),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "a Git-LFS pointer"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, name, content)


# ------------------------------------------------------------------------------------------ sets


@pytest.mark.parametrize(
    ("source", "content", "prompts", "metadata"),
    [
        ("drawbench:test.txt", DRAWBENCH, ["A red colored car.", "A horse riding an astronaut."], {}),
        (
            "partiprompts:PartiPrompts.tsv", PARTI, ["bond", '"G I G G L E" painted in thick letters'],
            {"Category": "Illustrations", "Challenge": "Writing & Symbols", "Note": ""},
        ),
        (
            "unigenbench:en.csv", UNIGENBENCH.replace("Two pandas", '"Two, pandas"'), ["A fox, in ink.", "Two, pandas"],
            {"index": "1", "sub_dims_en": {"Subjects": "Animal", "Testpoints": []}},
        ),
        (
            "vbench:vbench.csv", VBENCH, ["In a still frame,\na stop sign", "a toilet"],
            {"prompt_shorter": "a toilet", "prompt_zh": "厕所"},
        ),
        ("vbench:info.json", '[{"prompt_en": "a", "dimension": ["color"]}]', ["a"], {"dimension": ["color"]}),
        ("geneval:metadata.jsonl", GENEVAL * 4, ["a photo of two cows", "a photo of a blue cow"], json.loads(GENEVAL.split("\n")[1])),
        ("dpg_bench:prompts.jsonl", '{"prompt": "a cabbage", "key": "whoops9"}\n', ["a cabbage"], {"key": "whoops9"}),
        ("hpdv2:anime.json", '["a cat", "a dog"]', ["a cat", "a dog"], {}),
        ("imagereward:prompts.json", '[{"id": "1-2", "prompt": "a cat"}]', ["a cat"], {"id": "1-2"}),
        ("pickapic:test.txt", "a cat\na cat\n", ["a cat", "a cat"], {}),
        (
            "videogen_eval:videogen.csv", 'prompt,prompt_zh\n"A cat, running",猫\n', ["A cat, running"], {"prompt_zh": "猫"},
        ),
        ("ta_hard:ta.csv", "prompt\nA cat jumps and sleeps\n", ["A cat jumps and sleeps"], {}),
        ("dancegrpo_video:video_prompts.txt", "A cat runs.\nA dog, in slow motion.\n", ["A cat runs.", "A dog, in slow motion."], {}),
        ("flow_factory_video:train.txt", "A cat runs.\n", ["A cat runs."], {}),
        ("genrl_video:test.json", '{"prompt": "A cat"}\n{"prompt": "A dog"}\n', ["A cat", "A dog"], {}),
        ("t2i_compbench:color_val.txt", "a green bench and a blue bowl\n", ["a green bench and a blue bowl"], {}),
    ],
)  # fmt: skip
def test_a_set_by_name(
    source: str, content: str, prompts: list[str], metadata: dict[str, Any], tmp_path: Path, any_count: None
) -> None:
    """Metadata: of the last row."""
    name, _, file = source.partition(":")
    records = loaded(tmp_path, file, content, f"{name}:")
    assert [record.prompt for record in records] == prompts
    assert [record.uid for record in records] == list(range(len(prompts)))
    metadata.pop("prompt", None)
    assert records[-1].metadata == metadata


def test_genevals_rows_are_what_its_reward_reads(tmp_path: Path) -> None:
    two, blue = loaded(tmp_path, "evaluation_metadata.jsonl", GENEVAL)
    assert parse(two.metadata) and parse(blue.metadata)


def test_repeated_lines_of_a_plain_file_are_prompts_of_their_own(tmp_path: Path) -> None:
    assert len(loaded(tmp_path, "test.txt", DRAWBENCH)) == 10
    assert loaded(tmp_path, "en.csv", UNIGENBENCH)[1].metadata["sub_dims_en"].startswith("{")  # nothing says it is JSON


def test_sources_of_edits(tmp_path: Path) -> None:
    """Of Flow-Factory, UniRL, DanceGRPO, EditScore and flow_grpo."""
    for place in ("images/one.png", "data/two.png", "images/edit/three.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / place)

    def one(prefix: str, **row: Any) -> PromptRecord:
        (record,) = loaded(tmp_path, "train.jsonl", json.dumps(row), prefix)
        return record

    found = one("flow_factory:", prompt="solve", image="one.png", clue=30)
    assert (paths(found), found.metadata) == ((tmp_path / "images/one.png",), {"clue": 30})
    media = [{"modality": "image", "role": "condition", "uri": "data/two.png"}]
    found = one("unirl_edit:", prompt="remove it", media=media, metadata={"source": "s", "edit_reward_score": 1.5})
    assert (paths(found), found.metadata) == ((tmp_path / "data/two.png",), {"source": "s", "edit_reward_score": 1.5})
    found = one(
        "dancegrpo_edit:", target_image="images/1.jpg", source_image="images/one.png", instruction="add a tree",
        task_type=["add"], instruction_cn="加一棵树",
    )  # fmt: skip
    assert (found.prompt, paths(found)) == ("add a tree", (tmp_path / "images/one.png",))
    assert found.metadata == {"target_image": "images/1.jpg", "task_type": ["add"], "instruction_cn": "加一棵树"}
    found = one(
        "editscore:",
        instruction="make it blue",
        input_images=["images/one.png", "images/edit/three.png"],
        task_type="color",
    )
    assert (found.prompt, found.metadata) == ("make it blue", {"task_type": "color"})
    assert paths(found) == (tmp_path / "images/one.png", tmp_path / "images/edit/three.png")
    found = one("counting_edit:", prompt="add one cow", t2i_prompt="two cows", image="images/one.png", tag="counting")
    assert (found.prompt, found.metadata) == ("add one cow", {"t2i_prompt": "two cows", "tag": "counting"})
    assert paths(found) == (tmp_path / "images/one.png",)


def test_sources_of_edit_benchmarks(tmp_path: Path, any_count: None) -> None:
    """Of GEdit-Bench and the two EditReward-Benches, as .jsonl."""
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    same = {"instruction": "add a tree", "task_type": "subject-add"}
    for name, image, others in (
        ("gedit_bench", "input_image", {"key": "k1", "instruction_language": "en", "Intersection_exist": True}),
        ("editscore_editreward_bench", "input_image", {"key": ["k1", "k2"], "output_images": ["a.png", "b.png"]}),
        ("tiger_editreward_bench", "source_image", {"id": "7", "dataset": "2pair", "ranking": [1, 2]}),
    ):
        row = {**same, image: "one.png", **others}
        (found,) = loaded(tmp_path, "rows.jsonl", json.dumps(row), f"{name}:")
        assert (found.prompt, paths(found)) == ("add a tree", (tmp_path / "one.png",))
        assert found.metadata == {"task_type": "subject-add", **others}


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("unirl_edit:a.jsonl", '{"prompt": "a", "media": [{"modality": "video", "role": "condition", "uri": "x"}]}', "line 1: got .*'video'.* as a source image; expected"),
        ("unirl_edit:a.jsonl", '{"prompt": "a", "media": [], "metadata": 3}', "line 1: got metadata=3; expected an object"),
        ("editscore:a.jsonl", '{"prompt": "a"}', r"line 1: got .*; expected a non-empty text under 'instruction'"),
        ("unigenbench:a.csv", "prompt,sub_dims\na,{b\n", r"a\.csv, line 2, sub_dims: not JSON"),
        ("drawbench:a.txt", DRAWBENCH, r"got 2 prompts in drawbench:.*a\.txt; expected 200: take dataset/drawbench/test\.txt of github"),
        ("pickapic:a.txt", "a\n", "got 1 prompts in .*; expected 2048 or 25432: .* leave the name out for a part"),
        ("genrl_video:a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:2\n", "a Git-LFS pointer; expected the prompts themselves: `git lfs pull`"),
        ("tiger_editreward_bench:a.jsonl", '{"instruction": "a"}', "got 1 prompts in .*; expected 484: take .* TIGER-Lab/EditReward-Bench"),
        ("drawbench:a.parquet", "", r"got the prompt file .*a\.parquet; expected a name that ends in \.txt, "),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_sets_is_refused(source: str, content: str, message: str, tmp_path: Path) -> None:
    name, _, file = source.partition(":")
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, file, content, f"{name}:")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("drawbench", r"got the prompt set 'drawbench' without a file; expected 'drawbench:FILE': get .*DiffusionNFT"),
        ("hpdv2:", r"got the prompt set 'hpdv2:' without a file; .* get .*zhwang/HPDv2"),
        ("drawbnch:/nowhere/test.txt", r"'drawbnch:/nowhere/test.txt', which is neither .*; expected one of drawbench, partiprompts"),
        ("prompts.xml", r"got prompt source 'prompts.xml'; expected a file \(\.txt, \.jsonl, \.json, \.csv, \.tsv\), a set with"),
    ],
)  # fmt: skip
def test_a_source_that_is_none_says_what_there_is(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_a_missing_file_of_a_set_says_where_to_get_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv does not exist .*: get PartiPrompts\.tsv of github"):
        load_prompts("partiprompts:nowhere.tsv")


def test_a_configuration_may_name_any_of_them(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    (tmp_path / "edits.jsonl").write_text('{"instruction": "add a tree", "source_image": "one.png"}\n' * 4)
    (tmp_path / "held_out.tsv").write_text("Prompt\nred\n" + "blue\n" * 9)
    sources = f"dancegrpo_edit:{tmp_path}/edits.jsonl", f"{tmp_path}/held_out.tsv"
    with pytest.raises(ValueError, match="'add a tree' with 1 source image for a StableDiffusion3Pipeline; expected 0"):
        load_config(TINY, [f"prompts={sources[0]}"])
    config, _ = load_config(TINY, [f"evaluation.prompts={sources[1]}"])
    assert config.evaluation.prompts == sources[1]
    with pytest.raises(ConfigError, match="got the prompt set 'drawbench' without a file"):
        load_config(TINY, ["prompts=drawbench"])


def test_the_documentation_names_every_set() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("| name | prompts |")[2].partition("\n\n")[0]
    assert {
        name
        for line in table.splitlines()
        for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    } == {*prompt_sets.PROMPT_SETS}
