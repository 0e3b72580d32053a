"""Training of a small EditReward on pairs of Glyphs edits, and how often it puts the better one first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from flowalign.glyphs.edit.reward_checkpoint import TEMPLATES
from flowalign.glyphs.edit.reward_pairs import EditPairs, draw_pairs
from flowalign.glyphs.renderer import HEIGHT, WIDTH
from flowalign.glyphs.schedule import set_rate
from rewards import EditReward, RewardBatch, score
from rewards.qwen.edit_reward import HEADS
from rewards.qwen.regressor import Regressor, Turn
from rewards.qwen.vision import Patches

POINTS = 32  # of the quadrature
SPOILT = ("noisy", "blurred")  # kinds of pairs of which both results are as asked, and one is spoilt as the kind says


def ranking_loss(mean: Tensor, sigma: Tensor, order: Tensor) -> Tensor:
    """EditReward's (2509.26346), [...]: E over z ~ N(mean, sigma²) of -order · log sigmoid(z) - (1 - order) · log sigmoid(-z).

    mean: μ_A - μ_B; sigma: √(σ_A² + σ_B²); order: 1 where A is better, 0 where B is, 1/2 for a tie, which counts as both.
    By quadrature; the public code (TIGER-AI-Lab/EditReward) draws z 1,000 times. log sigmoid(-z) = log sigmoid(z) - z."""
    return _expected(lambda z: -logsigmoid(z), mean, sigma) + (1 - order) * mean


def win_probability(mean: Tensor, sigma: Tensor) -> Tensor:
    """E over z ~ N(mean, sigma²) of sigmoid(z), [...]: how probable it is that A is better, by both μ and both σ."""
    return _expected(torch.sigmoid, mean, sigma)


def _expected(function: Callable[[Tensor], Tensor], mean: Tensor, sigma: Tensor) -> Tensor:
    points, weights = (mean.new_tensor(part) for part in np.polynomial.hermite_e.hermegauss(POINTS))
    return (function(mean[..., None] + sigma[..., None] * points) * weights).sum(-1) / math.sqrt(2 * math.pi)


def difference(values: Tensor) -> tuple[Tensor, Tensor]:
    """(μ_A - μ_B, √(σ_A² + σ_B²)), [...] each, of (μ, log σ) [2, ..., 2] of A and B."""
    mu, log_sigma = values.unbind(-1)
    return mu[0] - mu[1], (2 * log_sigma).exp().sum(0).sqrt()


def pair_loss(values: Tensor, pairs: EditPairs) -> Tensor:
    """Of (μ, log σ) [2 results, N, 2 heads, 2]: the loss of each head on its own order, and of their mean on the overall order.

    The public code trains the mean of the heads alone; here each head is also told what it is asked for."""
    overall = ranking_loss(*difference(values.mean(2)), pairs.overall).mean()
    return overall + ranking_loss(*difference(values), pairs.order).mean()


def values_of(regressor: Regressor, pairs: EditPairs) -> Tensor:
    """(μ, log σ) by each head of each result, [2 results, N, 2 heads, 2], with their graph."""
    seen = [*_seen(regressor, pairs.sources, pairs.first), *_seen(regressor, pairs.sources, pairs.second)]
    answers = []
    for head, template in HEADS.items():
        texts = [TEMPLATES[template].replace("{text_prompt}", prompt) + TEMPLATES["suffix"] for prompt in pairs.prompts]
        turns = [Turn(pictures, text) for pictures, text in zip(seen, texts * 2, strict=True)]
        answers.append(regressor(turns, head)[0][:, 0])
    return torch.stack(answers, 1).unflatten(0, (2, len(pairs)))


def description_loss(regressor: Regressor, pairs: EditPairs) -> Tensor:
    """Cross entropy of the tokens of "write it in blue, noisy", given the source and the result of which it is true.

    With it the base learns to tell what was done and how, before it is asked how good that is. pairs: of the kinds
    SPOILT."""
    body, tokenizer = cast(Any, regressor.network["body"]), regressor.tokenizer
    seen = [*_seen(regressor, pairs.sources, pairs.first), *_seen(regressor, pairs.sources, pairs.second)]
    pictures = [picture for pair in seen for picture in pair]
    first_is_clean = pairs.order[:, 1] == 1
    texts = [
        f"{prompt}, {'clean' if is_clean else kind}"
        for clean in (first_is_clean, ~first_is_clean)
        for prompt, kind, is_clean in zip(pairs.prompts, pairs.kinds, clean.tolist(), strict=True)
    ]
    pad = tokenizer.convert_ids_to_tokens(body.config.image_token_id)
    tokens = len(pictures[0].rows) // body.config.vision_config.spatial_merge_size**2  # of one picture
    encoded = []
    for text in texts:
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        encoded.append(torch.tensor(tokenizer(chat.replace(pad, pad * tokens)).input_ids))
    ids = nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in encoded], batch_first=True)
    hidden = body(
        input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1]).expand_as(ids), use_cache=False,
        pixel_values=torch.cat([picture.rows for picture in pictures]),
        image_grid_thw=torch.tensor([picture.grid for picture in pictures]),
    ).last_hidden_state  # fmt: skip
    after_pictures = (ids == body.config.vision_end_token_id).cumsum(1) == 2
    predicted = after_pictures[:, :-1] & (mask[:, 1:] == 1)
    return cross_entropy(hidden[:, :-1][predicted] @ body.get_input_embeddings().weight.T, ids[:, 1:][predicted])


def _seen(regressor: Regressor, sources: Tensor, results: Tensor) -> list[list[Patches]]:
    eye = regressor.eye(HEIGHT * WIDTH, HEIGHT * WIDTH)
    return [[eye(image[None]) for image in pair] for pair in zip(sources, results, strict=True)]


def train(
    regressor: Regressor, words: Sequence[str], *, steps: int, base_steps: int, batch: int = 32, rate: float = 1e-3,
    seed: int = 0, report: Callable[[str, int, float], None] = lambda stage, step, loss: None,
) -> None:  # fmt: skip
    """Trains body and heads in place: `base_steps` on descriptions, then `steps` on pairs, of seen combinations of colors."""
    regressor.network.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)

    def description() -> Tensor:
        return description_loss(regressor, draw_pairs(batch, words, generator, unseen=False, kinds=SPOILT))

    def ranking() -> Tensor:
        pairs = draw_pairs(batch, words, generator, unseen=False)
        return pair_loss(values_of(regressor, pairs), pairs)

    for stage, loss_of, count, highest in (("base", description, base_steps, 2e-3), ("pairs", ranking, steps, rate)):
        optimizer = torch.optim.AdamW(regressor.network.parameters(), weight_decay=0.01)
        for step in range(count):
            set_rate(optimizer, highest, step, count, warmup=50)
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(regressor.network.parameters(), 1.0)
            optimizer.step()
            report(stage, step, float(loss.detach()))
    regressor.network.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Judged:
    """The scores of a reward on N pairs. preferred [N, 3]: μ of the first minus μ of the second, of overall, instruction
    following and quality. asked [N, 3]: which is better, as EditPairs.order. probability [N]: that the first is, by the
    reward's own σ."""

    preferred: Tensor
    asked: Tensor
    probability: Tensor
    kinds: list[str]

    def accuracy(self, column: int, kind: str | None = None) -> tuple[int, int]:
        """(pairs in the right order, pairs that have one) of a column and a kind (None: all); equal scores are wrong."""
        rows = torch.tensor([kind in (None, each) for each in self.kinds]) & (self.asked[:, column] != 0.5)
        right = self.preferred[rows, column] * (self.asked[rows, column] - 0.5) > 0
        return int(right.sum()), int(rows.sum())

    def calibration(self, bins: int = 10) -> float:
        """Expected calibration error: mean over pairs of |share of firsts that are better - mean probability| of their bin."""
        known = self.asked[:, 0] != 0.5
        probability, better = self.probability[known], self.asked[known, 0]
        place = (probability * bins).long().clamp(max=bins - 1)
        gaps = torch.zeros(bins).index_add(0, place, better - probability)
        return float(gaps.abs().sum() / len(probability))


def judged(reward: EditReward, pairs: EditPairs) -> Judged:
    """By the scores of a reward whose heads are pooled by their mean."""
    conditions = [[source] for source in pairs.sources]
    answers = [
        score(reward, RewardBatch(prompts=pairs.prompts, images=images, conditions=conditions))
        for images in (pairs.first, pairs.second)
    ]
    values = [
        torch.stack([output.scores[:, 0], *(output.components[name] for name in HEADS.values())], 1)
        for output in answers
    ]
    sigma = torch.stack([cast(Tensor, output.uncertainty)[:, 0] for output in answers]).norm(dim=0)
    preferred = values[0] - values[1]
    asked = torch.cat([pairs.overall[:, None], pairs.order], 1)
    return Judged(preferred, asked, win_probability(preferred[:, 0], sigma), pairs.kinds)
