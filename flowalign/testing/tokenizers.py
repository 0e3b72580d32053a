"""Tokenizers that spell: the classes of the released checkpoints, with a vocabulary of bytes or letters."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

LETTERS = sorted(set(string.printable) - set(string.whitespace))
SPACE = "▁"  # of sentencepiece


def tiny_tokenizer(kind: Any, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer of the class `kind`. settings: its arguments, such as model_max_length and chat_template; of `special_tokens`
    each is one token."""
    make = next((make for name, make in MAKERS.items() if kind.__name__.startswith(name)), None)
    if make is None:
        raise ValueError(
            f"got the tokenizer {kind.__name__}; expected one of {', '.join(MAKERS)}…: add a maker to {__file__}"
        )
    arguments = {name: value for name, value in settings.items() if name != "special_tokens"}
    tokenizer = make(kind, arguments)
    tokenizer.add_tokens(list(settings.get("special_tokens", ())), special_tokens=True)
    return tokenizer


def _clip(kind: Any, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", *letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
    return kind(vocab=_numbered(tokens), merges=[], **{"model_max_length": 77, **arguments})


def _byte_level(kind: Any, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    return kind(vocab=_numbered([*sorted(ByteLevel.alphabet()), "<|endoftext|>"]), merges=[], **arguments)


def _unigram(kind: Any, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in (SPACE, *LETTERS))]
    return kind(vocab=pieces, extra_ids=0, **arguments)


def _sentencepiece(kind: Any, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<s>", "</s>", "<mask>")
    return kind(vocab=_numbered([*special, SPACE, *LETTERS]), merges=[], **arguments)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


# how the name of a tokenizer's class begins -> what makes one
MAKERS: dict[str, Callable[[Any, dict[str, Any]], PreTrainedTokenizerBase]] = {
    "CLIP": _clip, "Qwen2": _byte_level, "T5": _unigram, "Gemma": _sentencepiece, "Llama": _sentencepiece,
}  # fmt: skip
