"""EditScore: its formulas, what each question shows the judge, its passes, and what happens to answers that say nothing."""

import math
import random

import numpy as np
import pytest
import torch

from rewards import RewardBatch, RewardError, score
from rewards.judges import EditScore
from rewards.judges.edit_score import WORDINGS
from tests.helpers.judge_server import JudgeServer, Reply
from tests.helpers.reward_parts import in_parts

SORRY = "I'm sorry, but I can't assist with that request."


def edits(count=1, **options):
    """Source i is of shade 10 i, its result of shade 10 i + 5; the instruction names it."""
    shades = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 6) * 10
    return RewardBatch(
        prompts=[f"make it {number}" for number in range(count)], images=shades + 5,
        conditions=[[shade, torch.zeros(3, 2, 2)] for shade in shades], **options,
    )  # fmt: skip


def says(first, second, reasoning="fine"):
    return f'{{"reasoning": "{reasoning}", "score": [{first}, {second}]}}'


def of_pair(asked):
    return len(asked.images) == 2


def answers(edit, quality):
    return lambda asked: edit if of_pair(asked) else quality


def scored(answer, batch=None, **options):
    with JudgeServer(answer) as judge:
        return score(EditScore(judge.endpoint(), **options), batch or edits(), max_fail_rate=1.0)


@pytest.mark.parametrize("numbers", [(20, 10, 25, 5), (25, 25, 25, 25), (0, 25, 25, 25), (12.5, 25, 6.25, 7)])
def test_the_overall_score_is_the_geometric_mean_of_the_two_minima(numbers):
    s1, s2, q1, q2 = numbers
    output = scored(answers(says(s1, s2), says(q1, q2)))
    overall = math.sqrt(min(s1, s2) / 2.5 * min(q1, q2) / 2.5)
    parts = {name: part.item() for name, part in output.components.items()}
    assert output.scores.item() == pytest.approx(overall / 10)
    assert parts == pytest.approx({
        "prompt_following": s1 / 2.5, "consistency": s2 / 2.5, "perceptual_quality": min(q1, q2) / 2.5, "overall": overall,
        "passes": 1, "noncanonical_template": 1,
    })  # fmt: skip
    assert output.uncertainty is None


def test_another_score_range():
    assert scored(answers(says(8, 4), says(9, 9)), score_range=10).scores.item() == pytest.approx(math.sqrt(4 * 9) / 10)


BY_SEED = {42: (20, 10, 25, 5), 43: (10, 20, 15, 20), 44: (25, 25, 20, 20)}


def by_seed(asked):
    s1, s2, q1, q2 = BY_SEED[asked.body["seed"]]
    return says(s1, s2) if of_pair(asked) else says(q1, q2)


def test_passes_are_averaged_last_and_their_spread_is_the_uncertainty():
    output = scored(by_seed, passes=3)
    each = [math.sqrt(min(s1, s2) * min(q1, q2)) / 25 for s1, s2, q1, q2 in BY_SEED.values()]
    assert output.scores.item() == pytest.approx(np.mean(each))
    assert output.uncertainty.item() == pytest.approx(np.std(each, ddof=1))


def test_averaging_first_leaves_over_editing_out():
    output = scored(by_seed, passes=3, reduction="average_first")
    success, quality = np.mean([20, 10, 25]) / 2.5, np.mean([5, 15, 20]) / 2.5
    assert output.scores.item() == pytest.approx(math.sqrt(success * quality) / 10)


def test_the_parts_as_channels():
    output = scored(by_seed, passes=3, output="parts")
    assert output.channels == ("prompt_following", "consistency", "perceptual_quality")
    assert output.scores[0].tolist() == pytest.approx(
        [np.mean([20, 10, 25]) / 25, np.mean([10, 20, 25]) / 25, np.mean([5, 15, 20]) / 25]
    )
    assert output.uncertainty[0, 0].item() == pytest.approx(np.std([20, 10, 25], ddof=1) / 25)


def test_what_the_judge_is_shown():
    with JudgeServer(by_seed) as judge:
        score(EditScore(judge.endpoint(concurrency=1), passes=2), edits(2).select([1]))
    assert [asked.body["seed"] for asked in judge.asked] == [42, 42, 43, 43]
    edit, quality = judge.asked[:2]
    assert [image[0, 0, 0] for image in edit.images] == [10, 15] and [image[0, 0, 0] for image in quality.images] == [
        15
    ]
    assert edit.images[0].shape == (4, 6, 3)
    context, two, rule, look = (wording.ours for wording in WORDINGS.values())
    filled = rule.replace("10", "25").replace("<instruction>", "make it 1")
    assert edit.turns == [f"{context}\n{two}\n{filled}"] and "from 0 to 25" in filled
    assert quality.turns == [context + "\n" + look.replace("10", "25")]
    sampling = {name: edit.body[name] for name in ("temperature", "top_p", "top_k", "max_tokens")}
    assert sampling == {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 512}


def test_a_number_in_the_instruction_is_left_as_it_is():
    batch = RewardBatch(prompts=["10 cats"], images=torch.zeros(1, 3, 4, 4), conditions=[[torch.ones(3, 4, 4)]])
    with JudgeServer(by_seed) as judge:
        score(EditScore(judge.endpoint(concurrency=1)), batch)
    assert judge.asked[0].turns[0].endswith(": 10 cats\n")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (SORRY, 'got none; expected "score": [2 numbers]; the answer: "I\'m sorry'),
        ('{"reasoning": "no list"}', "got none"),
        (says(20, "2, 3"), "got 3 numbers under 'score'; expected 2"),
        (says(30, 25), "got 30; expected 0 to 25"),
        (says("NaN", 25), "expected a number"),
        (Reply('{"reasoning": "long', finish="length"), 'the answer, cut at max_tokens: \'{"reasoning": "long\''),
        (Reply(status=400, raw=b"too long"), "HTTP 400 'too long'"),
        (Reply(raw=b"<html>"), "no chat completion"),
    ],
)
@pytest.mark.parametrize("place", ["edit", "quality"])
def test_an_answer_that_says_nothing_leaves_its_sample_without_a_score(bad, why, place):
    def answer(asked):
        spoilt = asked.images[-1][0, 0, 0] == 15 and of_pair(asked) == (place == "edit")
        return bad if spoilt else says(20, 25)

    output = scored(answer, edits(3))
    assert output.valid[:, 0].tolist() == [True, False, True] and output.scores[1].isnan()
    assert output.scores[[0, 2], 0].tolist() == pytest.approx([0.8] * 2)
    assert why in output.info[1] and output.components["overall"][1].isnan()


def test_a_reason_shows_the_first_200_characters_of_the_answer():
    info = scored(answers("x" * 500, says(1, 1))).info[0]
    assert info.endswith(repr("x" * 200))


def test_a_pass_that_cannot_be_read_is_left_out():
    def answer(asked):
        return SORRY if asked.body["seed"] == 43 and of_pair(asked) else by_seed(asked)

    output, other = scored(answer, passes=3), [math.sqrt(10 * 5) / 25, math.sqrt(25 * 20) / 25]
    assert output.scores.item() == pytest.approx(np.mean(other)) and output.components["passes"].item() == 2
    assert output.uncertainty.item() == pytest.approx(np.std(other, ddof=1)) and "sorry" in output.info[0]
    assert output.components["perceptual_quality"].item() == pytest.approx(
        (5 + 20) / 2 / 2.5
    )  # not of the pass left out


def test_one_pass_that_was_read_has_a_score_and_no_uncertainty():
    output = scored(lambda asked: SORRY if asked.body["seed"] > 42 else by_seed(asked), passes=3)
    assert bool(output.valid) and output.uncertainty.isnan().all()


def test_a_refusal_of_everything_is_an_error_of_the_reward():
    with (
        JudgeServer(lambda asked: SORRY) as judge,
        pytest.raises(RewardError, match=r"2 of 2 samples have no score.*sorry"),
    ):
        score(EditScore(judge.endpoint()), edits(2))


def test_a_batch_without_conditions_is_an_error_that_names_them():
    batch = RewardBatch(prompts=["p"], images=torch.zeros(1, 3, 4, 4))
    with (
        JudgeServer(by_seed) as judge,
        pytest.raises(RewardError, match="got a batch with images; expected conditions, which it reads"),
    ):
        score(EditScore(judge.endpoint()), batch)
    assert not judge.asked


def test_a_sample_without_a_source_is_not_asked_about():
    batch = RewardBatch(prompts=["p", "q"], images=torch.zeros(2, 3, 4, 4), conditions=[[], [torch.zeros(3, 4, 4)]])
    output = scored(by_seed, batch)
    assert (
        output.valid[:, 0].tolist() == [False, True] and output.info[0] == "no source image: its conditions are empty"
    )


def by_content(asked):
    """Drawn by the seed and the images, as a server with temperature draws."""
    rng = np.random.default_rng([asked.body["seed"], *[int(image[0, 0, 0]) for image in asked.images]])
    return says(*rng.uniform(0, 25, 2).round(3))


def test_scores_depend_neither_on_batch_mates_nor_on_their_order_and_repeat():
    with JudgeServer(by_content) as judge:
        reward, batch = EditScore(judge.endpoint(), passes=2), edits(3)
        together = score(reward, batch).scores
        assert len(together.unique()) == 3 and torch.equal(
            together[[2, 0, 1]], score(reward, batch.select([2, 0, 1])).scores
        )
        assert torch.equal(together, torch.cat([score(reward, part).scores for part in in_parts(batch, 2)]))
        assert not torch.equal(together, score(EditScore(judge.endpoint(), passes=3), batch).scores)


def test_random_states_are_left_alone():
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    scored(by_seed, passes=2)
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
    assert before[2] == np.random.get_state()[1].tolist()


def test_canonical_texts_from_files_and_one_changed_blank(tmp_path, monkeypatch):
    texts = {"context": "C", "two_images": "T", "edit": "10 <instruction>", "quality": "Q  10"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    from rewards.judges import edit_score
    from rewards.judges.template import Wording, fingerprint

    known = {
        name: Wording("", (fingerprint(text),), placeholders=WORDINGS[name].placeholders)
        for name, text in texts.items()
    }
    monkeypatch.setattr(edit_score, "WORDINGS", known)
    assert scored(by_seed, templates=str(tmp_path)).components["noncanonical_template"].item() == 0
    (tmp_path / "quality.txt").write_text("Q 10")
    assert scored(by_seed, templates=str(tmp_path)).components["noncanonical_template"].item() == 1


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"reduction": "mean"}, {"output": "all"}, {"score_range": 0}])
def test_wrong_settings_are_refused(wrong):
    with JudgeServer(by_seed) as judge, pytest.raises(ValueError, match=next(iter(wrong))):
        EditScore(judge.endpoint(), **wrong)
