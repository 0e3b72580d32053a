"""The OCR reward: does the image show the text that was asked for? As flow_grpo defines it, stricter, or smoother."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.ocr.reader import Line, RapidReader, Recognizer
from rewards.ocr.text import ctc_log_prob, f1, normalize_text, similarity

METRICS = ("edit", "exact", "soft", "anywhere", "words", "f1")
PARTS = (*METRICS, "edit_exempt")


@dataclass(eq=False)
class OCR:
    """OCR accuracy in [0, 1] of the text read in the picture (lines joined without separator, in reading order).

    The defaults are flow_grpo's image reward (flow_grpo/ocr.py), except that the target comes from the metadata and
    that a missing target is an invalid sample, not a crash.

    metric: what becomes the score; all of them are components.
      "edit"   1 - min(edit distance, L) / L with L = len(target); with substring_exempt, a target that stands anywhere
               in the text read scores 1, so extra text is free (component edit_exempt; edit is without the exemption)
      "exact"  1 if the text read is the target, else 0: most groups of siblings then agree and teach nothing
      "words"  "edit" in words instead of letters, 1 - word error rate; lines are words apart
      "f1"     of the words, in any order: 2 · common / (read + target)
      "anywhere" mean over the targets of "edit" against the part of the text read that fits best: any order of the
               targets, and extra text is free
      "soft"   p(target)^(1/L) under the recognizer's CTC posterior, the geometric mean probability of a letter: it
               tells siblings apart that are read alike. Extra text lowers it. It trusts the recognizer's confidence,
               which a policy can learn to exploit: compare with `exact`.
    target: "metadata" (metadata[target_key], a text or a list of several), "quotes" (between the prompt's first two straight
      double quotes) or "all_quotes" (of every pair of them). Several targets count as one text, in their order, but for
      "anywhere".
    normalize: of both texts. "flow_grpo" drops ASCII spaces and case; "strict" nothing; "loose" all but letters and
      digits of the NFKC form; for "words" and "f1", of each word. Recommended for new work: substring_exempt=False.
    fold: characters the recognizer may confuse, as {read: taken for}, before normalizing: {"0": "O"} where prompts hold
      capitals only.
    min_confidence: what is read in a line counts if read with more than this (flow_grpo: 0).
    recognizer: None is RapidReader(), whose options are workers, detect, timeout. Identical pictures of a batch are
      read once. What was read is in `info`.

    Videos: OnFrames(OCR(…)).
    """

    metric: Literal["edit", "exact", "soft", "anywhere", "words", "f1"] = "edit"
    target: Literal["metadata", "quotes", "all_quotes"] = "metadata"
    target_key: str = "target"
    normalize: Literal["flow_grpo", "strict", "loose"] = "flow_grpo"
    substring_exempt: bool = True
    fold: dict[str, str] | None = None
    min_confidence: float = 0.0
    recognizer: Recognizer | None = None
    name: str = "ocr"
    _reader: Recognizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for key, value, known in (
            ("metric", self.metric, METRICS),
            ("target", self.target, ("metadata", "quotes", "all_quotes")),
        ):
            if value not in known:
                raise ValueError(f"got {key}={value!r}; expected one of {known}")
        normalize_text("", self.normalize)  # raises on an unknown rule
        if any(len(a) != 1 or len(b) != 1 for a, b in (self.fold or {}).items()):
            raise ValueError(f"got fold={self.fold}; expected one character for one character")
        self._reader = self.recognizer if self.recognizer is not None else RapidReader()

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            range=(0, 1),
            licence="code and weights Apache-2.0 (RapidOCR); another recognizer: its own",
            checkpoint="PP-OCRv6 small, in the wheel of rapidocr" if self.recognizer is None else "",
        )

    def load(self) -> None:
        self._reader.load()

    def close(self) -> None:
        self._reader.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        given = [self._targets(batch, i) for i in range(len(batch))]
        targets = [texts if all(self._words([text]) for text in texts) else [] for texts in given]
        alphabet = self._alphabet("".join(text for texts in given for text in texts))
        wanted = [i for i, texts in enumerate(targets) if texts]  # without one there is no score, whatever is read
        images = batch.pixels().permute(0, 2, 3, 1).contiguous().numpy()
        found = dict(zip(wanted, self._read(images[wanted], alphabet), strict=True))
        pages = [found.get(i, []) for i in range(len(batch))]
        rows = [self._parts(page, texts, alphabet) for page, texts in zip(pages, targets, strict=True)]
        components = {key: torch.tensor([row[key] for row in rows], dtype=torch.float32) for key in PARTS}
        scores = components["edit_exempt" if self.metric == "edit" and self.substring_exempt else self.metric]
        info = [
            f"read {''.join(line.text for line in page)!r}" if texts else self._lacks(batch, i)
            for i, (page, texts) in enumerate(zip(pages, targets, strict=True))
        ]
        return RewardOutput(scores, ~scores.isnan(), components, info)

    def _targets(self, batch: RewardBatch, i: int) -> list[str]:
        """The texts that the image should show, as given; none if one of them is no text."""
        if self.target == "metadata":
            given = batch.metadata[i].get(self.target_key)
            texts = given if isinstance(given, list) else [given]
            return [text for text in texts if isinstance(text, str)] if all(isinstance(t, str) for t in texts) else []
        quoted = batch.prompts[i].split('"')[1:-1:2]
        return quoted[:1] if self.target == "quotes" else quoted

    def _lacks(self, batch: RewardBatch, i: int) -> str:
        """Why there is no score."""
        if self.target == "metadata":
            place, given = f"metadata[{self.target_key!r}]", batch.metadata[i].get(self.target_key)
        else:
            place, given = "the quoted part of the prompt", self._targets(batch, i) or None
        return f"no target: {place} is {given!r}; expected a text with at least one letter, or a list of such"

    def _clean(self, text: str) -> str:
        return normalize_text("".join((self.fold or {}).get(char, char) for char in text), self.normalize)

    def _alphabet(self, targets: str) -> str:
        """The characters that may count as a letter of a target, or, normalized away, as nothing."""
        fold = "".join((self.fold or {}).keys())
        chars = set(targets + targets.lower() + targets.upper() + fold + string.punctuation + " ")
        return "".join(sorted(chars))

    def _read(self, images: np.ndarray, alphabet: str) -> list[list[Line]]:
        """The lines read in uint8 RGB images [N, H, W, 3]; equal images are read once."""
        first: dict[bytes, int] = {}
        places = [first.setdefault(image.tobytes(), len(first)) for image in images]
        distinct = [places.index(number) for number in range(len(first))]
        pages = self._reader.read(images[distinct], alphabet) if distinct else []
        if len(pages) != len(distinct):
            raise ValueError(f"got {len(pages)} pages from the recognizer; expected {len(distinct)}, one per image")
        # a line in which nothing was read has no confidence, but a posterior that "soft" needs
        kept = [[line for line in page if not line.text or line.confidence > self.min_confidence] for page in pages]
        return [kept[number] for number in places]

    def _parts(self, page: list[Line], texts: list[str], alphabet: str) -> dict[str, float]:
        """The components of one picture; NaN without a target."""
        if not texts:
            return dict.fromkeys(PARTS, float("nan"))
        targets, read = [self._clean(text) for text in texts], self._clean("".join(line.text for line in page))
        target, words = "".join(targets), self._words(texts)
        read_words = self._words([line.text for line in page])
        edit = similarity(read, target)
        return {
            "exact": float(read == target),
            "edit": edit,
            "edit_exempt": 1.0 if target in read else edit,
            "anywhere": sum(similarity(read, each, anywhere=True) for each in targets) / len(targets),
            "words": similarity(read_words, words),
            "f1": f1(read_words, words),
            "soft": self._soft(page, target, alphabet),
        }

    def _words(self, texts: list[str]) -> list[str]:
        cleaned = [self._clean(word) for text in texts for word in text.split()]
        return [word for word in cleaned if word]

    def _soft(self, page: list[Line], target: str, alphabet: str) -> float:
        """p(target)^(1/L), with the lines' posteriors joined by a certain blank; NaN if the recognizer has none."""
        blank = np.eye(1, 1 + len(alphabet))
        frames: list[np.ndarray] = []
        for line in page:
            if line.posterior is None:
                if self.metric == "soft":
                    raise ValueError("metric 'soft' needs a recognizer with posteriors; this one has none: use 'edit'")
                return float("nan")
            frames += [line.posterior, blank]
        if not frames:
            return 0.0
        joined = np.concatenate(frames).astype(np.float64)
        cleaned = ["", *(self._clean(char) for char in alphabet)]  # the class of each column; "" counts as blank
        columns = [[i for i, char in enumerate(cleaned) if char == letter] for letter in ("", *target)]
        merged = np.stack([joined[:, column].sum(axis=1) for column in columns], axis=1)
        return float(np.exp(ctc_log_prob(merged[:, 1:], merged[:, 0], target) / len(target)))
