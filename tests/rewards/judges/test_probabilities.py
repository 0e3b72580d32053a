"""Judges that read the probabilities of an answer's first token (DeQA, Questions, PARM), and two that read short texts."""

import math

import pytest
import torch

from rewards import RewardBatch, score
from rewards.judges import PARM, WISE, DeQA, Questions, QwenVL, best_of
from tests.helpers.judge_server import JudgeServer, Reply, bright_judge

VQA = [["Is there a cat?", "Yes"], ["How many dogs are there?", "three"]]


def batch(*metadata, sigma=None):
    images = torch.arange(len(metadata), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    latents = None if sigma is None else torch.zeros(len(metadata), 1)
    levels = None if sigma is None else torch.tensor(sigma)
    return RewardBatch(
        prompts=["a cat"] * len(metadata), images=images, metadata=list(metadata), latents=latents, sigma=levels
    )


def row(asked):
    return int(asked.images[0][0, 0, 0])


def scored(judged, answer, given, **options):
    with JudgeServer(answer) as judge:
        return score(judged(judge.endpoint(), **options), given, max_fail_rate=1.0), judge.asked


def yes(p, **more):
    return Reply("yes", top={"yes": p, "no": 1 - p} | more)


# ------------------------------------------------------------------------------------------------------------- DeQA


def test_deqa_is_the_expected_level_over_5():
    p = {" excellent": 0.05, " good": 0.4, " fair": 0.2, " poor": 0.1, " bad": 0.05, " the": 0.2}
    output, asked = scored(DeQA, lambda asked: Reply("good", top=p), batch({}))
    level = (5 * 0.05 + 4 * 0.4 + 3 * 0.2 + 2 * 0.1 + 0.05) / 0.8
    assert output.scores.item() == pytest.approx(level / 5) and output.components["level"].item() == pytest.approx(
        level
    )
    assert output.uncertainty.item() == pytest.approx(0, abs=1e-6)
    assert asked[0].turns == ["Is the quality of this picture excellent, good, fair, poor or bad?", "Its quality is"]
    body = asked[0].body
    assert body["continue_final_message"] and (body["max_tokens"], body["top_logprobs"]) == (1, 20)


@pytest.mark.parametrize(("word", "level"), [("excellent", 5), ("Good", 4), (" fair", 3), (" Poor", 2), ("bad", 1)])
def test_deqa_of_one_word_is_its_level(word, level):
    assert scored(DeQA, lambda asked: Reply(word, top={word: 1.0}), batch({}))[0].scores.item() == pytest.approx(
        level / 5
    )


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("The", top={"The": 0.99, " good": 0.01}), "the likeliest token is 'The'"),
        (Reply("good", top={" good": 0.3, "a": 0.1}), "may be off by"),
        (Reply("good"), "expected an endpoint with logprobs"),
        (Reply(status=422), "HTTP 422"),
    ],
)
def test_deqa_masks_what_it_cannot_read(reply, why):
    output, _ = scored(DeQA, lambda asked: reply if row(asked) else Reply(top={" good": 1.0}), batch({}, {}))
    assert output.valid[:, 0].tolist() == [True, False] and why in output.info[1]


# -------------------------------------------------------------------------------------------------------- questions


def soft(asked):
    if "cat" in asked.turns[0]:
        return Reply(top={"Yes": 0.5, " yes": 0.3, "No": 0.2})
    return Reply(top={"three": 0.1, "3": 0.3, " Three": 0.05, "four": 0.55})


def test_soft_tifa_adds_the_forms_of_the_expected_answer_and_takes_the_geometric_mean():
    output, asked = scored(Questions, soft, batch({"vqa_list": VQA}))
    assert output.scores.item() == pytest.approx(math.sqrt(0.8 * 0.45)) and output.uncertainty.item() == pytest.approx(
        0, abs=1e-6
    )
    assert output.components["lowest"].item() == pytest.approx(0.45) and output.components["questions"].item() == 2
    assert {text.removesuffix(" One word is enough.") for one in asked for text in one.turns} == {VQA[0][0], VQA[1][0]}
    assert scored(Questions, soft, batch({"vqa_list": VQA}), aggregate="am")[0].scores.item() == pytest.approx(0.625)


def test_an_answer_that_is_not_among_the_likeliest_counts_0_and_the_uncertainty_says_how_much_it_may_be():
    given = batch({"vqa_list": VQA[:1]})
    output, _ = scored(Questions, lambda asked: Reply(top={"No": 0.9, "The": 0.01}), given)
    assert output.scores.item() == 0 and output.uncertainty.item() == pytest.approx(4 * 0.01)


def test_the_versus_form_is_the_sigmoid_of_the_difference_of_log_probabilities():
    output, _ = scored(
        Questions, lambda asked: Reply(top={"Yes": 0.3, "No": 0.1, "A": 0.6}), batch({"vqa_list": VQA[:1]}), versus=True
    )
    assert output.scores.item() == pytest.approx(1 / (1 + math.exp(math.log(0.1) - math.log(0.3))))
    negative = batch({"vqa_list": [["Is there a dog?", "No"]]})
    output, _ = scored(Questions, lambda asked: Reply(top={"Yes": 0.3, "No": 0.1, "A": 0.6}), negative, versus=True)
    assert output.scores.item() == pytest.approx(0.25)


def test_without_a_list_the_prompt_is_the_question():
    output, asked = scored(Questions, lambda asked: yes(0.7), batch({}), key=None)
    assert output.scores.item() == pytest.approx(0.7) and '"a cat"' in asked[0].turns[0]


@pytest.mark.parametrize(
    "wrong", [{}, {"vqa_list": []}, {"vqa_list": "Is it?"}, {"vqa_list": [["Is it?"]]}, {"vqa_list": [["a", 3]]}]
)
def test_a_sample_without_questions_is_invalid_and_not_asked_about(wrong):
    output, asked = scored(Questions, soft, batch({"vqa_list": VQA}, wrong, {"vqa_list": VQA[:1]}))
    assert output.valid[:, 0].tolist() == [True, False, True] and len(asked) == 3
    assert "metadata['vqa_list'] is" in output.info[1] and output.scores[2].item() == pytest.approx(0.8)


def test_a_question_without_an_answer_makes_its_sample_invalid():
    def answer(asked):
        return Reply(status=400) if row(asked) == 1 and "dogs" in asked.turns[0] else soft(asked)

    output, _ = scored(Questions, answer, batch(*[{"vqa_list": VQA}] * 3))
    assert output.valid[:, 0].tolist() == [True, False, True] and "HTTP 400" in output.info[1]


# ------------------------------------------------------------------------------------------------------------- PARM


def stages(asked):
    """Of row r: clear with P 0.3 + 0.2 r, potential 0.8, match 0.6."""
    if len(asked.turns) == 3:
        return yes(0.8)
    return yes(0.6) if "exactly" in asked.turns[0] else yes(0.3 + 0.2 * row(asked))


def test_parm_asks_by_the_noise_level_of_a_sample():
    given = batch({"sigma": 0.6}, {"sigma": 0.4}, {}, {}, sigma=[0.0, 0.0, 0.5, 0.0])
    output, asked = scored(PARM, stages, given)
    assert output.valid[:, 0].tolist() == [False, True, True, True]  # the first is not clear
    assert output.scores[1:, 0].tolist() == pytest.approx([0.8, 0.8, 0.6]) and "P(clear) = 0.30" in output.info[0]
    assert (
        output.components["clear"][1:3].tolist() == pytest.approx([0.5, 0.7]) and output.components["clear"][3].isnan()
    )
    assert output.components["potential"].isnan().tolist() == [True, False, False, True]
    assert output.components["match"].isnan().tolist() == [True, True, True, False]
    after = next(one for one in asked if len(one.turns) == 3)
    assert after.turns[1] == "yes" and "clear" in after.turns[0] and len(after.images) == 1


def test_parm_without_the_need_of_clarity_scores_every_potential():
    output, _ = scored(PARM, stages, batch({"sigma": 0.6}), require_clear=False)
    assert output.scores.item() == pytest.approx(0.8) and output.components["clear"].item() == pytest.approx(0.3)


def test_parm_ranks_what_is_not_clear_between_those_with_potential_and_those_without():
    """So that a selection drops first what was judged to have none, and goes on with what it cannot judge yet."""

    def potentials(asked):
        return yes([0.9, 0.2, 0.7, 0.6][row(asked)]) if len(asked.turns) == 3 else yes(0.4 if row(asked) == 2 else 0.9)

    given = batch({"sigma": 0.6}, {"sigma": 0.6}, {"sigma": 0.6}, {"sigma": 0.0})
    output, asked = scored(PARM, lambda a: yes(0.1) if "exactly" in a.turns[0] else potentials(a), given, unclear=0.5)
    assert output.scores[:, 0].tolist() == pytest.approx([0.9, 0.2, 0.5, 0.1]) and bool(output.valid.all())
    assert output.components["potential"].isnan().tolist() == [False, False, True, True] and len(asked) == 3 + 2 + 1
    failed, _ = scored(PARM, lambda a: Reply("Maybe", top={"Maybe": 1.0}), batch({"sigma": 0.6}), unclear=0.5)
    assert not failed.valid.any()  # not judged is not the same as not clear
    with pytest.raises(ValueError, match=r"unclear=2"):
        PARM(bright_judge(), unclear=2)


def test_parm_needs_a_noise_level():
    output, asked = scored(PARM, stages, batch({}, {"sigma": "late"}, {"sigma": True}))
    assert not bool(output.valid.any()) and not asked and "sigma is None; expected 0 to 1" in output.info[0]
    assert scored(PARM, stages, batch({}), sigma=0.0)[0].scores.item() == pytest.approx(0.6)
    assert scored(PARM, stages, batch({}), sigma=0.3, require_clear=False)[0].scores.item() == pytest.approx(0.8)


def test_parm_masks_an_unclear_answer_with_its_reason():
    output, _ = scored(PARM, lambda asked: Reply("Maybe", top={"Maybe": 1.0}), batch({"sigma": 0.6}, {"sigma": 0.0}))
    assert not bool(output.valid.any()) and all("likeliest token is 'Maybe'" in text for text in output.info)


def test_the_best_of_a_group_has_potential_and_matches_best_else_the_highest_potential():
    potential = torch.tensor([0.9, 0.6, 0.2, 0.1, 0.4, torch.nan, torch.nan, 0.5])
    match = torch.tensor([0.3, 0.7, 0.99, 0.9, 0.1, 0.9, 0.9, torch.nan])
    groups = [0, 0, 0, 1, 1, 1, 2, 3]
    assert best_of(potential, match, groups) == {0: 1, 1: 4, 2: 6, 3: 7}


# ------------------------------------------------------------------------------------------------------- short texts


def test_qwen_vl_is_the_level_over_5():
    texts = ["<Thought>3 of 5</Thought>\n<Score>4</Score>", "<Score>1</Score>", "Score: 4", "<Score>6</Score>"]
    output, asked = scored(QwenVL, lambda asked: texts[row(asked)], batch({}, {}, {}, {}))
    assert output.scores[:2, 0].tolist() == pytest.approx([0.8, 0.2]) and output.valid[:, 0].tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert "cat" not in asked[0].turns[0] and asked[0].body["max_tokens"] == 2048


def test_wise_weighs_its_axes():
    text = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
    given = batch({"explanation": "feline"}, {"explanation": "feline"}, {})
    output, asked = scored(WISE, lambda asked: text.replace("Realism: 1\n", "") if row(asked) == 1 else text, given)
    assert output.scores[0].item() == pytest.approx((0.7 * 2 + 0.2 * 1 + 0.1 * 0) / 2)
    assert output.valid[:, 0].tolist() == [True, False, False] and "Realism" in output.info[1]
    assert output.info[2] == "metadata['explanation'] is None; expected a text" and len(asked) == 2
    assert "The explanation: feline" in asked[0].turns[0] and asked[0].body["temperature"] == 0.2
