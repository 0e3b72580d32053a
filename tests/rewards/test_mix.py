"""Weighted sums keep their parts and their failures."""

from dataclasses import dataclass, field

import pytest
import torch

from rewards import Mix, RewardBatch, RewardError, RewardOutput, RewardSpec, score
from tests.helpers.reward_parts import in_parts


@dataclass
class Fixed:
    name: str
    values: list[float]
    calls: list[str] = field(default_factory=list)
    spec = RewardSpec(inputs=())

    def __call__(self, batch):
        scores = torch.tensor(self.values)[batch.sample_ids]
        return RewardOutput(scores, torch.isfinite(scores), {"half": scores / 2}, [f"saw {v}" for v in scores.tolist()])

    def load(self):
        self.calls.append("load")

    def close(self):
        self.calls.append("close")


BATCH = RewardBatch(prompts=["a", "b", "c"])
NAN = float("nan")


def test_weighted_sum_and_components():
    output = score(Mix([Fixed("x", [1, 2, 3.0]), Fixed("y", [10, 0, -10.0])], [2.0, 0.5]), BATCH)
    assert output.scores[:, 0].tolist() == [7, 4, 1] and output.valid.all()
    assert output.components["x"].tolist() == [1, 2, 3] and output.components["y"].tolist() == [10, 0, -10]
    assert output.components["x/half"].tolist() == [0.5, 1, 1.5]
    assert output.info[0] == "x: saw 1.0; y: saw 10.0"


def test_valid_only_where_all_parts_are():
    mix = Mix([Fixed("x", [1, NAN, 3.0]), Fixed("y", [1, 1, NAN])], [1.0, 0.0])
    output = score(mix, BATCH, max_fail_rate=0.7)
    assert output.valid[:, 0].tolist() == [True, False, False]
    assert output.scores[0] == 1 and output.scores[1:].isnan().all()
    with pytest.raises(RewardError, match="reward 'mix': 2 of 3"):
        score(mix, BATCH)


def test_failing_part_is_named():
    class Broken(Fixed):
        def __call__(self, batch):
            raise ValueError("boom")

    with pytest.raises(RewardError, match=r"'mix' failed.*reward 'y' failed.*boom"):
        score(Mix([Fixed("x", [1, 1, 1.0]), Broken("y", [])], [1.0, 1.0]), BATCH)


def test_batch_mates_do_not_matter():
    mix = Mix([Fixed("x", [1, 2, 3.0]), Fixed("y", [3, NAN, 5.0])], [1.0, 1.0])
    parts = [score(mix, part, max_fail_rate=1).scores for part in in_parts(BATCH)]
    assert torch.equal(torch.cat(parts).nan_to_num(-1), score(mix, BATCH).scores.nan_to_num(-1))


def test_load_and_close_reach_every_part():
    parts = [Fixed("x", []), Fixed("y", [])]
    mix = Mix(parts, [1.0, 1.0])
    mix.load()
    mix.close()
    assert [part.calls for part in parts] == [["load", "close"]] * 2


@pytest.mark.parametrize(("parts", "weights"), [(["x"], [1.0, 2.0]), ([], []), (["x", "x"], [1.0, 1.0])])
def test_wrong_construction(parts, weights):
    with pytest.raises(ValueError, match=r"expected one weight per reward|different names"):
        Mix([Fixed(name, []) for name in parts], weights)
