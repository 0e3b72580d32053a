"""Where the wording of a judge comes from, and that one changed character makes it noncanonical."""

from pathlib import Path

import pytest

from rewards.judges import EditScore, UnifiedReward, qwen_vl, unified
from rewards.judges.edit_score import WORDINGS
from rewards.judges.template import Wording, fingerprint, load_templates
from tests.helpers.judge_server import bright_judge

CANON = "Judge {prompt}.  \nTwo spaces stand before this line.\n"
KNOWN = {"point": Wording("ours: {prompt}", (fingerprint(CANON),), "problem", ("{prompt}",))}


def loaded(source: Path | str | None):
    return load_templates(None if source is None else str(source), KNOWN)


def test_the_fingerprint_is_sha_256() -> None:
    assert fingerprint("abc") == "ba7816bf8f01cfea"  # of FIPS 180-2


def test_ours_is_noncanonical() -> None:
    assert loaded(None).texts["point"] == "ours: {prompt}" and loaded(None).noncanonical


def test_a_text_file_a_folder_and_code_hold_the_canonical_text(tmp_path: Path) -> None:
    (tmp_path / "point.txt").write_text(CANON)
    code = tmp_path / "infer.py"
    code.write_text(
        f"raise SystemExit\nclass A:\n    problem = {CANON!r}\n    other = 'x'\n".replace("= 'Judge", "= f'Judge")
    )
    for source in (tmp_path, tmp_path / "point.txt", code):  # the code is not run
        assert loaded(source).texts["point"] == CANON and not loaded(source).noncanonical, source


@pytest.mark.parametrize(
    "changed", [CANON.replace("  \n", " \n"), CANON.rstrip("\n"), CANON.replace("\n", "\r\n"), CANON + " "]
)
def test_altered_white_space_is_noncanonical(tmp_path: Path, changed: str) -> None:
    (tmp_path / "point.txt").write_bytes(changed.encode())
    assert loaded(tmp_path).noncanonical and loaded(tmp_path).texts["point"] == changed


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judge_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "prompts.py").write_text(f"raise RuntimeError\nproblem = {CANON!r}")
    monkeypatch.syspath_prepend(tmp_path)
    assert not loaded("judge_package.prompts").noncanonical


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("absent/point.txt", None, "cannot be read"),
        ("no_such_package.prompts", None, "no installed module"),
        ("../point", None, "no installed module"),
        ("point.txt", "no placeholder", r"without \['\{prompt\}'\]"),
        ("code.py", "problem = (", "no Python"),
        ("code.py", "other = 'x'", "got 0 texts under the name 'problem'"),
        ("code.py", "problem = 'a {prompt}'\nproblem = 'b {prompt}'", "got 2 texts"),
        ("point.md", "{prompt}", "expected a folder, a .txt or .py file"),
    ],
)
def test_a_source_without_the_text_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, content: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(source).write_text(content)
    with pytest.raises(ValueError, match=message):
        loaded(source)


def test_one_file_cannot_hold_four_texts(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("x")
    with pytest.raises(ValueError, match="for 4 templates; expected a folder with context"):
        EditScore(bright_judge(), templates=str(tmp_path / "all.txt"))


def test_the_fingerprints_are_those_of_the_public_code() -> None:
    """VectorSpaceLab/EditScore 6e0f1b9a73, CodeGoat24/UnifiedReward ff6f520247, yifan123/flow_grpo ac4c86e8ca."""
    assert [wording.fingerprints for wording in WORDINGS.values()] == [
        ("125d6dcfcbd41692",), ("369c6b21479e6a85",), ("5b9aa479977bc317",), ("cd929b5619a3ad93",),
    ]  # fmt: skip
    assert unified.POINT[2].fingerprints == ("75d52d3ae771f89b",) and unified.PAIR[2].fingerprints == (
        "828e9ab2f81c3b6d",
    )
    assert qwen_vl.RUBRIC.fingerprints == ("14a112e01d0fd4ce",)


def test_a_judge_asks_with_the_text_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "point.txt").write_text("Mine: [{prompt}]")
    judge = UnifiedReward(bright_judge(), templates=str(tmp_path))
    assert judge._templates.texts["point"] == "Mine: [{prompt}]" and judge._templates.noncanonical
