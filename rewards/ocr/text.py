"""Compares the target text with what was read: normalization, edit distance, and the likelihood under a CTC recognizer."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np


def normalize_text(text: str, rule: str) -> str:
    """`flow_grpo`: no ASCII spaces, lower case, punctuation kept. `strict`: unchanged. `loose`: Unicode NFKC, lower
    case, letters and digits only."""
    if rule == "flow_grpo":
        return text.replace(" ", "").lower()
    if rule == "loose":
        return "".join(char for char in unicodedata.normalize("NFKC", text).lower() if char.isalnum())
    if rule == "strict":
        return text
    raise ValueError(f"got normalize={rule!r}; expected 'flow_grpo', 'strict' or 'loose'")


def edit_distance(a: Sequence[str], b: Sequence[str], *, anywhere: bool = False) -> int:
    """Levenshtein distance of texts, or of lists of words: insertions, deletions and substitutions, each 1. anywhere: the least
    one between `b` and any part of `a` in one piece."""
    row, least = list(range(len(b) + 1)), len(b)
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], 0 if anywhere else i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
        least = min(least, row[-1])
    return least if anywhere else row[-1]


def similarity(read: Sequence[str], target: Sequence[str], *, anywhere: bool = False) -> float:
    """1 - min(d, L) / L with d the edit distance and L = len(target) > 0, in [0, 1]: 1 less the error rate of characters (CER,
    of texts) or of words (WER, of lists), cut at 0. anywhere: the best over all parts of what was read."""
    return 1.0 - min(edit_distance(read, target, anywhere=anywhere), len(target)) / len(target)


def f1(read: Sequence[str], target: Sequence[str]) -> float:
    """2 · common / (read + target words), each word as often as it stands there, in any order; target not empty."""
    return 2 * (Counter(read) & Counter(target)).total() / (len(read) + len(target))


def ctc_log_prob(letters: np.ndarray, blank: np.ndarray, target: str) -> float:
    """log p(target): the sum over all CTC paths that collapse to the target (Graves et al. 2006, eq. 5-8).

    letters [T, L]: probability of each target letter at each frame; blank [T]. -inf where no path fits.
    """
    states = 2 * len(target) + 1  # blank, letter, blank, ..., letter, blank
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant
        emission = np.log(np.repeat(blank[:, None], states, axis=1))
        emission[:, 1::2] = np.log(letters)
    # a letter may follow the previous letter without a blank between, unless both are the same
    skips = [i for i in range(3, states, 2) if target[i // 2] != target[i // 2 - 1]]
    paths = np.full(states, -np.inf)
    paths[0] = 0.0
    for frame in emission:
        arrived = paths.copy()
        arrived[1:] = np.logaddexp(arrived[1:], paths[:-1])
        arrived[skips] = np.logaddexp(arrived[skips], paths[[i - 2 for i in skips]])
        paths = arrived + frame
    return float(np.logaddexp(paths[-1], paths[-2])) if len(emission) else -np.inf
