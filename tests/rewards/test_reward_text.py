"""Edit distance, normalizations, and the CTC likelihood against enumeration of all paths."""

import itertools

import numpy as np
import pytest

from rewards.ocr.text import ctc_log_prob, edit_distance, normalize_text, similarity


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
    assert similarity("x" * 100, "abcd", exempt=True) == 0
    assert similarity("xabcdx", "abcd", exempt=True) == 1
    assert similarity("xabcdx", "abcd", exempt=False) == 0.5


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
