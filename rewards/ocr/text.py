"""Compares the target text with what was read: normalization, edit distance, and the likelihood under a CTC recognizer."""

from __future__ import annotations

import unicodedata

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


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def similarity(read: str, target: str, *, exempt: bool) -> float:
    """1 - min(d, L) / L with d the edit distance and L = len(target) > 0, in [0, 1] (flow_grpo's OCR reward).

    exempt: a target that stands anywhere in what was read has d = 0, so extra text costs nothing.
    """
    if exempt and target in read:
        return 1.0
    return 1.0 - min(edit_distance(read, target), len(target)) / len(target)


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
