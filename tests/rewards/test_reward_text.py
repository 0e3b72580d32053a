"""Edit distance, normalizations, and the CTC likelihood against enumeration of all paths."""

import itertools

import numpy as np
import pytest

from rewards.ocr.text import ctc_log_prob, edit_distance, f1, normalize_text, similarity


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("rule", "expected"), [("flow_grpo", "hello\tw０rld!"), ("strict", "He llo\tW０rld!"), ("loose", "hellow0rld")]
)
def test_normalize(rule, expected):
    assert normalize_text("He llo\tW０rld!", rule) == expected


def test_unknown_rule():
    with pytest.raises(ValueError, match="expected 'flow_grpo', 'strict' or 'loose'"):
        normalize_text("a", "lose")


def test_similarity_is_capped_at_the_target():
    assert similarity("x" * 100, "abcd") == 0
    assert similarity("xabcdx", "abcd") == 0.5
    assert similarity(["a", "cat"], ["a", "dog", "ran"]) == pytest.approx(
        1 / 3
    )  # of words: one kept, one other, one missing


@pytest.mark.parametrize("read", ["", "zz", "xabcdx", "xabdx", "bcd", "dcba", "abxcdab"])
def test_anywhere_is_the_least_distance_to_any_part(read):
    parts = [read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)]
    assert edit_distance(read, "abcd", anywhere=True) == min(edit_distance(part, "abcd") for part in parts)
    assert similarity(read, "abcd", anywhere=True) == 1 - edit_distance(read, "abcd", anywhere=True) / 4


def test_f1_counts_each_word_as_often_as_it_stands_there():
    assert f1(["b", "a"], ["a", "b"]) == 1 and f1([], ["a"]) == 0
    assert f1(["a", "a", "x"], ["a", "b"]) == pytest.approx(2 * 1 / 5)


@pytest.mark.parametrize("target", ["a", "ab", "aa", "aba", "abba"])
@pytest.mark.parametrize("frames", [3, 6])
def test_ctc_likelihood_equals_the_sum_over_all_paths(target, frames):
    posterior = np.random.default_rng(0).dirichlet(np.ones(3), size=frames)  # columns: blank, a, b
    total = 0.0
    for path in itertools.product(range(3), repeat=frames):
        collapsed = "".join("-ab"[k] for k, _ in itertools.groupby(path)).replace("-", "")
        if collapsed == target:
            total += np.prod(posterior[np.arange(frames), path])
    letters = posterior[:, ["-ab".index(char) for char in target]]
    with np.errstate(divide="ignore"):
        assert ctc_log_prob(letters, posterior[:, 0], target) == pytest.approx(np.log(total), abs=1e-12)


def test_ctc_survives_long_lines_without_underflow():
    assert ctc_log_prob(np.full((2000, 1), 1e-3), np.full(2000, 1e-3), "a") == pytest.approx(
        2000 * np.log(1e-3) + np.log(2000 * 2001 / 2), rel=1e-9
    )
