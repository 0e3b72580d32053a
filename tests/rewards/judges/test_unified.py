"""UnifiedReward: one image at a time, and win rates inside a group."""

import math
from itertools import combinations

import pytest
import torch

from rewards import RewardBatch, RewardError, score
from rewards.judges import UnifiedReward, UnifiedWinRate
from rewards.judges.unified import pairs_in_ring
from tests.helpers.judge_server import JudgeServer, Reply

AXES = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"


def shades(*values, groups=None):
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return RewardBatch(prompts=["a cat"] * len(values), images=images, group_ids=groups or [])


def shade(asked):
    return int(asked.images[0][0, 0, 0])


# ------------------------------------------------------------------------------------------------------- one image


def pointwise(texts, version):
    batch = shades(*range(len(texts)))
    with JudgeServer(lambda asked: texts[shade(asked)]) as judge:
        return score(UnifiedReward(judge.endpoint(), version), batch, max_fail_rate=1.0), judge.asked


def test_version_2_is_the_mean_of_three_axes_from_0_to_1():
    texts = [
        AXES.format(2.694700002670288, 2.371500015258789, 2.802500009536743),
        AXES.format(5, 5, 5),
        AXES.format(1, 1, 1),
    ]
    output, asked = pointwise(texts, 2)
    mean = (2.694700002670288 + 2.371500015258789 + 2.802500009536743) / 3
    assert output.scores[:, 0].tolist() == pytest.approx([(mean - 1) / 4, 1, 0])
    assert output.components["style"].tolist() == pytest.approx([2.8025, 5, 1]) and set(output.components) == {
        "alignment", "coherence", "style", "noncanonical_template",
    }  # fmt: skip
    assert "Caption: [a cat]" in asked[0].turns[0] and asked[0].body["temperature"] == 0


def test_version_1_is_the_final_score_over_5():
    output, _ = pointwise(["cat (animal): 1\nFinal Score: 4.5/5", "Final Score: 1"], 1)
    assert output.scores[:, 0].tolist() == pytest.approx([0.9, 0.2]) and output.components["final"].tolist() == [4.5, 1]


def test_a_missing_axis_makes_a_sample_invalid():
    texts = [AXES.format(3, 3, 3), AXES.format(3, 3, 3).replace("Style", "Other"), AXES.format(3, 30, 3), "3 3 3"]
    output, _ = pointwise(texts, 2)
    assert output.valid[:, 0].tolist() == [True, False, False, False] and "Style Score" in output.info[1]
    assert "got 30; expected 1 to 5" in output.info[2]


# ------------------------------------------------------------------------------------------------------- win rates


def brighter(asked):
    first, second = (int(image[0, 0, 0]) for image in asked.images)
    return "Both images are equally good" if first == second else f"Image {1 + (second > first)} is better"


def rates(answer, batch, **options):
    with JudgeServer(answer) as judge:
        reward = UnifiedWinRate(judge.endpoint(), **{"version": 1, **options})
        return score(reward, batch, max_fail_rate=1.0), judge.asked


def test_win_rates_of_a_transitive_judge_are_ranks():
    output, asked = rates(brighter, shades(30, 10, 20, 20))
    assert not bool(output.valid.any()) and not asked  # each sample is its own group
    output, asked = rates(brighter, shades(30, 10, 20, 20, groups=[7] * 4))
    assert output.scores[:, 0].tolist() == pytest.approx([1, 0, 0.5, 0.5])
    assert len(asked) == 7  # in place of 12: two pictures are equal
    assert output.components["comparisons"].tolist() == [3] * 4
    assert output.components["same_in_both_orders"].tolist() == [1] * 4


def test_a_judge_that_prefers_the_first_image_gives_all_a_half():
    output, _ = rates(lambda asked: "Image 1 is better", shades(1, 2, 3, groups=[0] * 3))
    assert output.scores[:, 0].tolist() == [0.5] * 3 and output.components["same_in_both_orders"].tolist() == [0] * 3
    output, asked = rates(lambda asked: "Image 1 is better", shades(1, 2, 3, groups=[0] * 3), both_orders=False)
    assert sorted(output.scores[:, 0].tolist()) == [0, 0.5, 1] and len(asked) == 3  # the bias stays


def test_groups_do_not_meet():
    output, asked = rates(brighter, shades(1, 2, 3, 4, groups=[0, 1, 0, 1]))
    assert output.scores[:, 0].tolist() == [0, 0, 1, 1] and len(asked) == 4


def test_version_2_compares_the_mean_shares():
    def shares(asked):
        first = [0.9, 0.3, 0.5] if shade(asked) == 9 else [0.1, 0.7, 0.5]
        names = ("Alignment", "Coherence", "Style")
        return "\n\n".join(
            f"{name} Score:\n Image 1: {x}\n Image 2: {1 - x}" for name, x in zip(names, first, strict=True)
        )

    output, asked = rates(shares, shades(9, 1, groups=[0, 0]), version=2)
    assert output.scores[:, 0].tolist() == [1, 0]
    assert [int(image[0, 0, 0]) for image in asked[0].images] != [int(image[0, 0, 0]) for image in asked[1].images]


def test_a_pair_that_cannot_be_read_is_left_out_for_both():
    def answer(asked):
        seen = {int(image[0, 0, 0]) for image in asked.images}
        return "no idea" if seen == {1, 3} and shade(asked) == 1 else brighter(asked)

    output, _ = rates(answer, shades(1, 2, 3, groups=[0] * 3))
    assert output.scores[:, 0].tolist() == [0, 0.5, 1] and output.components["comparisons"].tolist() == [1, 2, 1]
    assert "0 verdicts" in output.info[0] and "no idea" in output.info[2]


def test_a_sample_without_any_pair_is_invalid():
    output, _ = rates(brighter, shades(1, 2, 3, groups=[0, 0, 1]))
    assert output.valid[:, 0].tolist() == [True, True, False]
    assert output.info[2] == "it is alone in its group"
    output, _ = rates(
        lambda asked: Reply(status=400) if 3 in [i[0, 0, 0] for i in asked.images] else brighter(asked),
        shades(1, 2, 3, groups=[0] * 3),
    )
    assert output.scores[:2, 0].tolist() == [0, 1] and not output.valid[2] and "HTTP 400" in output.info[2]


def test_the_order_of_the_batch_does_not_matter():
    batch = shades(*range(0, 70, 10), groups=[0] * 7)
    first, asked = rates(brighter, batch, opponents=2)
    order = [3, 1, 6, 0, 5, 2, 4]
    again, _ = rates(brighter, batch.select(order), opponents=2)
    assert torch.equal(first.scores[order], again.scores) and len(asked) == 14
    assert first.components["comparisons"].tolist() == [2] * 7
    other, _ = rates(brighter, batch, opponents=2, seed=1)
    assert not torch.equal(first.scores, other.scores)


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("opponents", [None, 1, 2, 3, 4, 20])
def test_a_ring_gives_each_at_least_so_many_opponents(count, opponents):
    ring = [10 + place for place in range(count)]
    pairs = pairs_in_ring(ring, opponents)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(a != b for a, b in pairs)
    met = [sum(member in pair for pair in pairs) for member in ring]
    least = count - 1 if opponents is None else min(opponents, count - 1)
    assert min(met) >= least and max(met) - min(met) == 0 and max(met) <= least + 1
    assert opponents is not None or pairs == list(combinations(ring, 2))


def test_as_a_z_score_it_is_the_advantage_of_pref_grpo():
    """Of the ranks 0, 1/3, 2/3, 1 the population z-score, as flowalign.advantage.Normalized takes it."""
    rate = rates(brighter, shades(4, 3, 2, 1, groups=[0] * 4))[0].scores[:, 0].double()
    z = (rate - rate.mean()) / rate.std(correction=0)
    assert z.tolist() == pytest.approx(
        [3 / math.sqrt(5), 1 / math.sqrt(5), -1 / math.sqrt(5), -3 / math.sqrt(5)], abs=1e-6
    )


@pytest.mark.parametrize("wrong", [{"version": 3}, {"opponents": 0}])
def test_wrong_settings_are_refused(wrong):
    with JudgeServer(brighter) as judge, pytest.raises(ValueError, match=next(iter(wrong))):
        UnifiedWinRate(judge.endpoint(), **wrong)


def test_images_are_needed():
    with JudgeServer(brighter) as judge, pytest.raises(RewardError, match="expected images"):
        score(UnifiedReward(judge.endpoint()), RewardBatch(prompts=["p"]))
