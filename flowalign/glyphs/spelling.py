"""The T5 tokenizer of Glyphs-Video and Glyphs-Edit: one token per word of the template, and quoted words letter by letter.

T5 has no absolute positions, so a quoted word's first and last letter are tokens with their quote: `"CAT"` is `"C`, `A`, `T"`.
"""

from collections.abc import Iterable

from transformers import T5Tokenizer

from flowalign.glyphs.prompts import LETTERS

SPACE = "▁"


def spelling_tokenizer(template: Iterable[str], length: int) -> T5Tokenizer:
    """template: the words that are one token each; length: most tokens of a prompt."""
    whole = [SPACE + word for word in template]
    letters = [*(f'{SPACE}"{letter}' for letter in LETTERS), *LETTERS, *(f'{letter}"' for letter in LETTERS)]
    single = [SPACE, '"', *LETTERS.lower()]  # for what the template does not say
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -1.0) for piece in (*whole, *letters)] + [(piece, -9.0) for piece in single]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
