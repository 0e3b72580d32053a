"""The prompt grammar, the two word lists and the tokenizer."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from flowalign.glyphs.parts import TOKENS, build_tokenizer
from flowalign.glyphs.pretrain import sample_batch
from flowalign.glyphs.prompts import INKS, PAPERS, held_out_prompts, make_prompt, parse_prompt, train_prompts


def test_make_and_parse_are_inverse_on_the_whole_grammar_of_colors() -> None:
    for ink in INKS:
        for paper in PAPERS:
            assert parse_prompt(make_prompt("KITE", ink, paper)) == ("KITE", ink, paper)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        'the word "kite" in red on a white background',
        'the word "KITES" in red on a white background',
        'the word "KITE" in white on a red background',
        'the word "KITE" in red on a white background!',
    ],
)
def test_other_text_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a Glyphs prompt"):
        parse_prompt(prompt)


def test_lists_are_disjoint_distinct_and_even_in_colors() -> None:
    train, held_out = train_prompts(), held_out_prompts()
    words = [record["target"] for record in train + held_out]
    assert (len(train), len(held_out)) == (1024, 512)
    assert len(set(words)) == len(words)
    pairs = Counter((record["ink"], record["paper"]) for record in held_out)
    assert set(pairs.values()) == {32}
    assert len(pairs) == 16


def test_lists_never_change() -> None:
    assert held_out_prompts()[0]["prompt"] == 'the word "JXKE" in red on a white background'
    assert train_prompts()[-1]["prompt"] == 'the word "PFHX" in black on a cyan background'


def test_records_agree_with_their_prompt() -> None:
    for record in held_out_prompts():
        assert parse_prompt(record["prompt"]) == (record["target"], record["ink"], record["paper"])
        assert record["ink_rgb"] == INKS[record["ink"]]
        assert record["paper_rgb"] == PAPERS[record["paper"]]


def test_pretraining_never_draws_a_held_out_word() -> None:
    held_out = {record["target"] for record in held_out_prompts()}
    prompts = sample_batch(20_000, torch.Generator().manual_seed(0)).prompts
    drawn = {parse_prompt(prompt).word for prompt in prompts}
    assert len(drawn) > 19_000
    assert not drawn & held_out  # 22 are expected without the exclusion


@pytest.mark.parametrize("word", ["KITE", "AAAA", "THEA", "WORD", "BLUE", "PINK", "CYAN"])
def test_quoted_words_are_spelt(word: str) -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer.tokenize(make_prompt(word, "red", "yellow"))
    spelt = [*word[:3].lower(), word[3].lower() + "</w>"]
    assert tokens == ["the", "word", '"</w>', *spelt, '"</w>', "in", "red", "on", "a", "yellow", "background"]


@pytest.mark.parametrize("word", ["RED", "ON", "THE", "A"])
def test_quoted_template_words_are_spelt_too(word: str) -> None:
    tokens = build_tokenizer().tokenize(f'the word "{word}" in red on a white background')
    assert tokens[3 : 3 + len(word)] == [*word[:-1].lower(), word[-1].lower() + "</w>"]


def test_a_prompt_has_sixteen_tokens_none_unknown_and_survives_a_save(tmp_path: Path) -> None:
    prompts = [record["prompt"] for record in held_out_prompts()]
    tokenizer = build_tokenizer()
    ids = tokenizer(prompts).input_ids
    assert {len(row) for row in ids} == {TOKENS}
    assert all(row.index(tokenizer.eos_token_id) == TOKENS - 1 for row in ids)  # end is also "unknown"
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(prompts).input_ids == ids
    assert again.model_max_length == TOKENS
    assert again("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_importing_glyphs_is_cheap() -> None:
    code = "import sys, flowalign.glyphs; print(sorted({'diffusers', 'transformers', 'rapidocr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
