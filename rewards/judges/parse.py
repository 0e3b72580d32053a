"""What a judge's answer says, or Unreadable: numbers by their labels, tags or keys, verdicts, and first-token probabilities.

Nothing is guessed: no number of an explanation is taken for a score, none outside its range is clamped, and a score that is
stated twice, differently, is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product

NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
END = r"(?!\w|%|\.\d|\s*[-–]\s*\d|\s*/\s*\d)"  # no part of 45, 4.55, "1-5" or "4/10"
LEAST_MASS = 0.1  # probability that the words that are asked for have together, or the answer is none of them
SURE = 0.02  # how far an expectation may be off by words outside the likeliest tokens, as a share of its range


class Unreadable(ValueError):
    """An answer that does not say what was asked."""


def in_range(text: str, low: float, high: float) -> float:
    """The number that `text` is; Unreadable if it is none, or outside [low, high]."""
    if not re.fullmatch(NUMBER, text.strip()):
        raise Unreadable(f"got {text.strip()[:40]!r}; expected a number")
    if not low <= float(text) <= high:
        raise Unreadable(f"got {text.strip()}; expected {low:g} to {high:g}")
    return float(text)


def labelled(text: str, label: str, low: float, high: float) -> float:
    """The number after `label:`, as in "Final Score: 4.5", "**Style Score (1-5):** 2.5" or "Score: 4/5"."""
    start = rf"(?<!\w){re.escape(label)}(?:\s*\(\d+[-–]\d+\))?[\s*_]*[:：][\s*_]*"
    found = re.findall(rf"{start}({NUMBER})(?:\s*/\s*({NUMBER}))?{END}", text, re.IGNORECASE)
    if wrong := [scale for _, scale in found if scale and float(scale) != high]:
        raise Unreadable(f"got {label!r} out of {wrong[0]}; expected out of {high:g}")
    return in_range(_only([number for number, _ in found], f"'{label}: <number>'"), low, high)


def tagged(text: str, tag: str, low: float, high: float) -> float:
    """The number in <tag>...</tag>."""
    found = re.findall(rf"<{tag}>\s*({NUMBER})\s*</{tag}>", text, re.IGNORECASE)
    return in_range(_only(found, f"<{tag}>number</{tag}>"), low, high)


def listed(text: str, key: str, count: int, low: float, high: float) -> list[float]:
    """The `count` numbers in the list under `key` of a JSON object.

    Only `"key": [...]` has to be sound, not the rest of the object: explanations often hold quotes that are not escaped. A
    comma may trail."""
    lists = re.findall(rf'"{re.escape(key)}"\s*:\s*\[([^\[\]]*)\]', text)
    parts = _only(lists, f'"{key}": [{count} numbers]').strip().removesuffix(",").split(",")
    if len(parts) != count:
        raise Unreadable(f"got {len(parts)} numbers under {key!r}; expected {count}")
    return [in_range(part, low, high) for part in parts]


def share_of_first(text: str, label: str) -> float:
    """What Image 1 has of the unit that it shares with Image 2, in the lines that follow `label:`."""
    image = r"[\s*_]*Image {}[\s*_]*:[\s*_]*" + f"({NUMBER})"
    lines = rf"(?<!\w){re.escape(label)}[\s*_]*:{image.format(1)}{image.format(2)}{END}"
    pairs = ["/".join(pair) for pair in re.findall(lines, text, re.IGNORECASE)]
    found = _only(pairs, f"'{label}:' with 'Image 1: <number>' and 'Image 2: <number>'")
    first, second = (in_range(number, 0, 1) for number in found.split("/"))
    if abs(first + second - 1) > 0.01:
        raise Unreadable(f"got {label} {first:g} and {second:g}; expected numbers whose sum is 1")
    return first


def verdict(text: str) -> float:
    """1 if Image 1 is better, 0 if Image 2 is, 0.5 if they are equally good; in <answer> if there is one."""
    said = {"image 1 is better": 1.0, "image 2 is better": 0.0, "equally good": 0.5}
    place = text.lower().rpartition("<answer>")[2].partition("</answer>")[0]
    found = [value for words, value in said.items() if words in place]
    if len(found) != 1:
        raise Unreadable(f"got {len(found)} verdicts; expected one of {list(said)}")
    return found[0]


def forms(word: str) -> list[str]:
    """How a token may write a word: lower case or capitalized, after a space or not."""
    return list(dict.fromkeys(f"{space}{each}" for space in ("", " ") for each in (word, word.capitalize())))


def mass(top: Mapping[str, float], tokens: Sequence[str]) -> tuple[float, float]:
    """(probability of `tokens` together, how much more it can be): one that is not among the likeliest tokens `top`
    (probability by text) has at most the least probability there, and all of them what is left of 1."""
    if not top:
        raise Unreadable("got no token probabilities; expected an endpoint with logprobs")
    hidden = sum(token not in top for token in tokens)
    return sum(top.get(token, 0.0) for token in tokens), min(
        hidden * min(top.values()), max(0.0, 1 - sum(top.values()))
    )


def expectation(top: Mapping[str, float], values: Mapping[str, float]) -> tuple[float, float]:
    """(E, d): E = Σ_w v_w p_w / Σ_w p_w, over the words w of `values`, p_w being the probability of all forms of w as the
    first token; d: how far E can be off by forms that are not among the likeliest tokens.

    Unreadable if the words have less than LEAST_MASS together, or d is more than SURE of the range of the values."""
    masses = [mass(top, forms(word)) for word in values]
    total = sum(seen for seen, _ in masses)
    if total < LEAST_MASS:
        likeliest = max(top, key=lambda token: top[token])
        raise Unreadable(f"got {list(values)} with a probability of {total:.2g}; the likeliest token is {likeliest!r}")
    mean = sum(value * seen for value, (seen, _) in zip(values.values(), masses, strict=True)) / total
    # E is monotonic in each hidden probability, so its extremes are at the corners
    corners = product(*[{seen, seen + more} for seen, more in masses])
    off = max(
        abs(sum(value * p for value, p in zip(values.values(), corner, strict=True)) / sum(corner) - mean)
        for corner in corners
    )
    if off > SURE * (max(values.values()) - min(values.values())):
        raise Unreadable(
            f"got an expectation of {mean:.3g} that may be off by {off:.2g}, since words of {list(values)} are not among the "
            f"{len(top)} likeliest tokens; expected more of them, or a model that answers in these words"
        )
    return mean, off


def _only(found: Sequence[str], what: str) -> str:
    """The one thing that was found, however often."""
    if len(set(found)) != 1:
        raise Unreadable(f"got {'none' if not found else f'{len(set(found))} different ones'}; expected {what}")
    return found[0]
