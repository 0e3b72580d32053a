"""A run's last line and report say what makes its figures doubtful."""

import re
from pathlib import Path

import pytest
import torch

from flowalign.evaluation.paired_gain import paired_gain
from flowalign.report.doubts import doubts
from flowalign.report.summary import gains_table
from tests.helpers.tiny_run import run_it

REWARDS = """
def constant(images, prompts):
    return [0.5] * len(prompts)


def picky(images, prompts):  # every prompt on a yellow page has no score
    return [None if "yellow" in prompt else float(image.mean()) for image, prompt in zip(images, prompts)]
"""


def function(path: Path, name: str) -> str:
    return f'{{"class_path": "rewards.FunctionReward", "init_args": {{"path": "{path}:{name}"}}}}'


def row(step: int, **changes: float) -> dict[str, float]:
    plain = {"reward/mean": 0.5, "reward/ocr_mean": 0.5, "reward/ocr_std": 0.1, "group/zero_std_ratio": 0.2}
    return {"step": step, **plain, **changes}


def test_dropped_pairs_and_a_constant_reward_are_said_in_the_last_line_and_the_report(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.py"
    path.write_text(REWARDS)
    summary = run_it(
        tiny_pipeline, tmp_path / "runs", "run.iterations=1", "evaluation.count=12", f"reward={function(path, 'constant')}",
        f"evaluation.rewards=[{function(path, 'picky')}]",
    )  # fmt: skip
    dropped = "picky dropped 3 of 12 pairs, which it could not score (base 3, tuned 3): its gain is that of the rest"
    constant = (
        "the training reward constant gave all images the same score in the only iteration: nothing was learned from it"
    )
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"; but {dropped}; but {constant}") and last.startswith("held-out picky, 12 prompts: ")
    page = re.sub(r"\s+", " ", (tmp_path / "runs" / "tiny" / "report.html").read_text())
    assert f"{dropped}.</p>" in page and f"{constant}.</p>" in page
    assert (summary["pairs"], summary["dropped"], summary["unscored_tuned"]) == (9, 3, 3)
    assert summary["wins"] + summary["losses"] + summary["ties"] == 9
    assert set(summary["rewards"]["gain"]) == {"picky", "constant"}  # the training reward is measured too


def test_pairs_that_only_the_tuned_model_lacks_are_told_from_the_bases() -> None:
    base, tuned = (
        torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0, 5.0]),
        torch.tensor([2.0, 1.0, 3.0, torch.nan, torch.nan, 5.0]),
    )
    gain = paired_gain(base, tuned)
    assert (gain.pairs, gain.wins, gain.losses, gain.ties) == (3, 1, 1, 1)
    assert (gain.dropped, gain.unscored_base, gain.unscored_tuned) == (3, 1, 2)
    (line,) = doubts(gains_table({"ocr": gain, "other": paired_gain(base[:2], tuned[:2])}), [])
    assert line.startswith("ocr dropped 3 of 6 pairs, which it could not score (base 1, tuned 2)")


def test_a_reward_that_is_constant_through_the_run_is_told_from_one_that_is_so_for_a_while() -> None:
    still = {"reward/ocr_std": 1e-17}
    assert doubts({}, [row(1, **still), row(2)]) == []
    (line,) = doubts({}, [row(1, **still), row(2, **still)])
    assert (
        line
        == "the training reward ocr gave all images the same score in all 2 iterations: nothing was learned from it"
    )
    (line,) = doubts({}, [row(1, **{"group/zero_std_ratio": 1.0}), row(2, **{"group/zero_std_ratio": 1.0})])
    assert line.startswith("the training reward told no images of a prompt apart in all 2 iterations")
    assert doubts({}, []) == doubts({}, [{"step": 1, "reward/mean": 0.1}]) == []
