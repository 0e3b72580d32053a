"""Models side by side: means, gains, win rates, diversity and monitors in closed form."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.evaluation.appearance import Appearance, distances_across_prompts, diversity
from flowalign.evaluation.columns import Evaluation, metrics
from flowalign.evaluation.evaluate import EvaluationResult
from flowalign.evaluation.paired_gain import paired_gain

NAN = torch.nan


def result(scores: list[float], pixels: Tensor | None = None, **changes: Any) -> EvaluationResult:
    """Two samples of each of len(scores) / 2 prompts; by default every image is gray."""
    prompts = len(scores) // 2
    whole = EvaluationResult(
        uids=[*range(10, 10 + prompts)] * 2, prompts=[f"prompt {number}" for number in range(prompts)] * 2,
        scores={"bright": torch.tensor(scores).double()},
        pixels=torch.full((len(scores), 3, 8, 8), 51, dtype=torch.uint8) if pixels is None else pixels,
        seed=3, num_inference_steps=4, guidance_scale=1.5, evaluations_per_image=8.0, seconds=2.5,
    )  # fmt: skip
    return replace(whole, **changes)


def test_means_gains_and_win_rates_count_ties_half_and_drop_what_has_no_score() -> None:
    base, tuned = result([1.0, 2.0, 3.0, 4.0, 5.0, NAN]), result([2.0, 2.0, 2.0, 6.0, 6.0, 9.0])
    found = metrics(Evaluation({"base": base, "a": tuned}, frozenset({"bright"}), {"a": "runs/a"}))
    assert (found["baseline"], found["columns"], found["rewards"]) == ("base", ["base", "a"], ["bright"])
    assert (found["prompts"], found["samples_per_prompt"], found["seed"], found["trained"]) == (3, 2, 3, ["bright"])
    assert found["mean"] == {"base": {"bright": 3.0}, "a": {"bright": 4.5}}
    gain = found["gain"]["a"]["bright"]
    assert (gain["wins"], gain["losses"], gain["ties"], gain["pairs"], gain["dropped"]) == (3, 1, 1, 5, 1)
    assert gain["gain"] == pytest.approx((1 + 0 - 1 + 2 + 1) / 5) and gain["win_rate"] == 3.5 / 5
    assert gain["ci95"] == list(paired_gain(base.scores["bright"], tuned.scores["bright"], base.uids).interval or ())
    low, high = found["interval"]["a"]["bright"]
    assert 2.0 <= low < 4.5 < high <= 7.5  # means of prompts: 4, 4 and 5.5
    assert found["settings"]["a"] == {
        "num_inference_steps": 4, "guidance_scale": 1.5, "evaluations_per_image": 8.0, "seconds": 2.5, "source": "runs/a",
    }  # fmt: skip
    assert found["settings"]["base"]["source"] == "base" and json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_cannot_be_measured_is_none() -> None:
    found = metrics(Evaluation({"base": result([NAN] * 4), "a": result([1.0] * 4)}))
    assert found["mean"]["base"]["bright"] is None and found["interval"]["base"]["bright"] is None
    gain = found["gain"]["a"]["bright"]
    assert (gain["gain"], gain["ci95"], gain["win_rate"], gain["pairs"], gain["dropped"]) == (None, None, None, 0, 4)
    one = metrics(Evaluation({"base": result([1.0, 3.0])}))
    assert one["mean"]["base"]["bright"] == 2.0 and one["interval"]["base"]["bright"] is None and one["gain"] == {}
    assert one["diversity"]["base"]["distance_across_prompts"] is None  # there is one prompt


def test_the_distance_across_prompts_as_a_number_per_image_varies_as_the_mean_over_pairs_does() -> None:
    """Its mean is that of `diversity`; over many draws the variance of the mean is that of independent numbers, which that of the
    images' own mean distances is four times below."""
    generator, samples = torch.Generator().manual_seed(0), [0] * 12 + [1] * 12
    look = Appearance({}, torch.rand(24, 5, generator=generator))
    numbers = distances_across_prompts(look.thumbnails, samples)
    assert float(numbers.mean()) == pytest.approx(diversity(look, [*range(12)] * 2, samples)["distance_across_prompts"])
    drawn = torch.stack(
        [distances_across_prompts(each, [0] * 40) for each in torch.rand(600, 40, 1, generator=generator)]
    )
    independent = drawn.var(1).mean() / 40
    assert float(drawn.mean(1).var() / independent) == pytest.approx(1, abs=0.2)
    assert bool(distances_across_prompts(torch.rand(2, 5), [0, 1]).isnan().all())  # nothing to compare with


def test_diversity_and_monitors_of_plain_colors() -> None:
    """Prompts 10 and 11; levels 0 and 51 of the first, 102 and 51 of the second."""
    pixels = torch.tensor([0, 102, 51, 51], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    found = metrics(Evaluation({"base": result([0.0] * 4, pixels)}))
    diversity, monitors = found["diversity"]["base"], found["monitors"]["base"]
    assert diversity["distance_within_prompt"] == pytest.approx(0.2)  # 51 / 255, twice
    assert diversity["repeated_within_prompt"] == 0.0
    assert diversity["distance_across_prompts"] == pytest.approx(0.2)  # 102 and 0 of 255
    assert diversity["repeated_across_prompts"] == 0.5
    assert monitors["brightness"] == pytest.approx(51 / 255) and monitors["contrast"] == pytest.approx(0, abs=1e-6)
    assert monitors["black"] == 0.25 and monitors["flat"] == 1.0 and monitors["jpeg_kb"] > 0.1


def test_of_a_video_the_frames_count_alike() -> None:
    levels = torch.tensor([[0, 102], [51, 51]], dtype=torch.uint8)
    videos = Appearance.of(levels.view(2, 2, 1, 1, 1).expand(2, 2, 3, 8, 8))
    assert videos.monitors["brightness"].tolist() == pytest.approx([0.2, 0.2])
    assert float((videos.thumbnails[0] - videos.thumbnails[1]).norm()) == pytest.approx(0.2)


def test_columns_that_differ_are_refused() -> None:
    base = result([1.0, 2.0])
    for changed, what in ((result([1.0, 2.0], seed=4), "seed"), (result([1.0] * 4), "uids"),
                          (replace(base, scores={"other": torch.ones(2)}), "scores"),
                          (result([1.0, 2.0], digest="x"), "digest")):  # fmt: skip
        with pytest.raises(ValueError, match=f"base and a differ in {what}"):
            Evaluation({"base": base, "a": changed})
    with pytest.raises(ValueError, match="without columns"):
        Evaluation({})
    with pytest.raises(ValueError, match="trained="):
        Evaluation({"base": base}, frozenset({"dark"}))


def test_the_long_table(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation({"base": result([1.0, 2.0, 3.0, 4.0]), "a": result([5.0, 6.0, 7.0, 8.0])})
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))  # flowalign installs none
    table = evaluation.to_pandas()
    assert list(table) == ["column", "uid", "prompt", "sample", "bright"]
    assert table["column"] == ["base"] * 4 + ["a"] * 4 and table["uid"] == [10, 11] * 4
    assert table["sample"] == [0, 0, 1, 1] * 2 and table["bright"] == [1, 2, 3, 4, 5, 6, 7, 8]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        evaluation.to_pandas()
