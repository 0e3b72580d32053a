"""What judges say, and what is read of it: canned texts, good and bad."""

import math

import pytest

from rewards.judges.parse import (
    Unreadable,
    expectation,
    forms,
    in_range,
    labelled,
    listed,
    mass,
    share_of_first,
    tagged,
    verdict,
)


@pytest.mark.parametrize(
    ("text", "number"), [("4", 4), (" 4.5\n", 4.5), ("+1", 1), ("5e0", 5), ("2.694700002670288", 2.694700002670288)]
)
def test_a_number_in_its_range(text, number):
    assert in_range(text, 1, 5) == number


@pytest.mark.parametrize("text", ["", "NaN", "inf", "-1", "5.01", "1e999", "four", "4 5", "0x4", "4_0", "٤ "])
def test_no_number_in_the_range(text):
    with pytest.raises(Unreadable, match="expected"):
        in_range(text, 1, 4.5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Final Score: 4.5", 4.5),
        ("I see a cat. Final score:3", 3),
        ("Final Score: 4.5/5", 4.5),
        ("**Final Score:** 4.", 4),
        ("Final Score (1-5): 2.694700002670288\n", 2.694700002670288),
        ("Final Score: 1-5 is asked for. Final Score: 2", 2),
        ("Final Score: 2. So: Final Score: 2", 2),
    ],
)
def test_a_labelled_number(text, number):
    assert labelled(text, "Final Score", 1, 5) == number


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "got none"),
        ("The score is 4", "got none"),
        ("Final Score: X", "got none"),
        ("Final Score: NaN", "got none"),
        ("Final Score: 1-5", "got none"),
        ("Semifinal Score: 4", "got none"),
        ("Final Score: 4%", "got none"),
        ("Final Score: 45", "got 45"),
        ("Final Score: -3", "got -3"),
        ("Final Score: 4/10", "out of 10"),
        ("Final Score: 3 ... Final Score: 4", "2 different"),
        ("Final Score:" + " " * 10**5, "got none"),
    ],
)
def test_no_labelled_number(text, why):
    with pytest.raises(Unreadable, match=why):
        labelled(text, "Final Score", 1, 5)


def test_wise_lines():
    text = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
    assert [labelled(text, axis, 0, 2) for axis in ("Consistency", "Realism", "Aesthetic Quality")] == [2, 1, 0]
    with pytest.raises(Unreadable, match="got 3; expected 0 to 2"):
        labelled("Consistency: 3", "Consistency", 0, 2)
    with pytest.raises(Unreadable, match="got none"):
        labelled("Consistency: 2\nRealism: 1", "Aesthetic Quality", 0, 2)


def test_a_negative_score_keeps_its_sign():
    assert labelled("Image 1 Score: -0.52", "Image 1 Score", -math.inf, math.inf) == -0.52


def test_a_tagged_number():
    assert tagged("<Thought>3 of 5</Thought>\n<Score>4</Score>", "Score", 1, 5) == 4
    for text in ("<Score>X</Score>", "4", "<Score>4", "<Score>0</Score>", "<Score>4</Score><Score>5</Score>"):
        with pytest.raises(Unreadable):
            tagged(text, "Score", 1, 5)


@pytest.mark.parametrize(
    "text",
    [
        '{"reasoning": "fine", "score": [20, 2.5]}',
        '```json\n{\n"reasoning" : "fine",\n"score" : [20.0, 2.5],\n}\n```',
        '{"score": [20, 2.5,], "reasoning": "a trailing comma"}',
        '{"reasoning": "it says "STOP" and [1, 2]", "score": [20, 2.5]}',
        'Sure! {"score":[20,2.5]} I hope that helps.',
    ],
)
def test_a_list_of_numbers(text):
    assert listed(text, "score", 2, 0, 25) == [20, 2.5]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I'm sorry, but I can't assist with that request.", "got none"),
        ('{"reasoning": "no list"}', "got none"),
        ('{"score": 20}', "got none"),
        ('{"score": [20, 2', "got none"),
        ("[20, 2]", "got none"),
        ('{"score": []}', "got 1 numbers|expected 2"),
        ('{"score": [20]}', "got 1 numbers"),
        ('{"score": [20, 2, 3]}', "got 3 numbers"),
        ('{"score": [20, 30]}', "got 30; expected 0 to 25"),
        ('{"score": [-1, 3]}', "got -1"),
        ('{"score": ["20", 3]}', "expected a number"),
        ('{"score": [NaN, 3]}', "expected a number"),
        ('{"score": [20, 3]} or {"score": [3, 20]}', "2 different"),
    ],
)
def test_no_list_of_numbers(text, why):
    with pytest.raises(Unreadable, match=why):
        listed(text, "score", 2, 0, 25)


SHARES = "Alignment Score:\n Image 1: 0.435699999332428\n Image 2: 0.564300000667572\n\nStyle Score:\n Image 1: 1\n Image 2: 0"


def test_shares_of_two_images():
    assert share_of_first(SHARES, "Alignment Score") == 0.435699999332428 and share_of_first(SHARES, "Style Score") == 1
    for text, why in (
        (SHARES.replace("0.5643", "0.4643"), "sum is 1"),
        (SHARES.replace("Image 2: 0.5", "Image 2: -0.5"), "got -0.5"),
        (SHARES.replace(" Image 2: 0.564300000667572\n", ""), "got none"),
    ):
        with pytest.raises(Unreadable, match=why):
            share_of_first(text, "Alignment Score")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Image 1 is better.", 1),
        ("So IMAGE 2 is better.", 0),
        ("Both images are equally good.", 0.5),
        ("<think>Image 2 is better in style</think><answer>Image 1 is better</answer>", 1),
    ],
)
def test_a_verdict(text, value):
    assert verdict(text) == value


@pytest.mark.parametrize(
    "text", ["", "Image 3 is better", "Image 1 is better. Image 2 is better.", "Image 1 is better <answer>?</answer>"]
)
def test_no_verdict(text):
    with pytest.raises(Unreadable, match="verdicts"):
        verdict(text)


def test_a_word_has_four_forms_and_a_digit_two():
    assert forms("yes") == ["yes", "Yes", " yes", " Yes"] and forms("3") == ["3", " 3"]


def test_the_mass_of_tokens_and_what_may_be_hidden():
    top = {"yes": 0.5, " Yes": 0.2, "no": 0.1}
    assert mass(top, forms("yes")) == (0.7, pytest.approx(0.2))  # two forms unseen, each at most 0.1; 0.2 is left of 1
    assert mass({"yes": 0.97, "no": 0.02}, forms("yes")) == (0.97, pytest.approx(0.01))  # 0.01 is left
    with pytest.raises(Unreadable, match="logprobs"):
        mass({}, ["yes"])


def test_an_expectation_is_exact_where_nothing_is_left_to_hide():
    top = {" good": 0.3, "Good": 0.1, " bad": 0.1, " the": 0.5}
    mean, off = expectation(top, {"good": 4.0, "fair": 3.0, "bad": 1.0})
    assert mean == pytest.approx((4 * 0.4 + 1 * 0.1) / 0.5) and off == pytest.approx(0, abs=1e-12)


def test_an_expectation_is_off_by_no_more_than_it_says():
    top, hidden = {"yes": 0.9, "no": 0.06, "perhaps": 0.004}, 0.004
    mean, off = expectation(top, {"yes": 1.0, "no": 0.0})
    assert mean == pytest.approx(0.9 / 0.96)
    for yes in (0.0, 3 * hidden):  # three forms of each word may hide, each at most 0.004
        for no in (0.0, 3 * hidden):
            assert abs((0.9 + yes) / (0.96 + yes + no) - mean) <= off + 1e-12
    assert off < 0.02


def test_an_expectation_of_hidden_words_is_none():
    with pytest.raises(Unreadable, match="may be off by"):
        expectation({"good": 0.3, "the": 0.1, "a": 0.1}, {"good": 4.0, "bad": 1.0})
    with pytest.raises(Unreadable, match="the likeliest token is 'The'"):
        expectation({"The": 0.92, "yes": 0.04, "no": 0.04}, {"yes": 1.0, "no": 0.0})
