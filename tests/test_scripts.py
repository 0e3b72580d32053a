"""Arguments of scripts that cannot work are refused before the work begins."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
WRONG = [
    ("drakes", ["--iterations", "0"], "at least one iteration"),
    ("drakes", ["--alpha", "0"], "alpha above 0"),
    ("drakes", ["--alpha", "nan"], "alpha above 0"),
    ("drakes", ["--relaxed", "9"], "1 to 8 relaxed steps"),
    ("make_glyphs_images", ["--samples", "1"], "expected at least 2"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), WRONG)
def test_arguments_that_cannot_work_are_refused(
    name: str, arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", [name, "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
