"""The small EditReward of Glyphs: its loss against closed forms, its files, and what its training reaches."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from flowalign.glyphs import held_out_prompts
from flowalign.glyphs.edit.reward_checkpoint import load_folder, network_of, write_base, write_trained, write_untrained
from flowalign.glyphs.edit.reward_pairs import KINDS, EditPairs, draw_pairs
from flowalign.glyphs.edit.reward_training import (
    SPOILT,
    Judged,
    description_loss,
    difference,
    judged,
    pair_loss,
    ranking_loss,
    train,
    values_of,
    win_probability,
)
from rewards import EditReward
from tests.helpers import tiny_qwen

ROOT = Path(__file__).parents[2]
MEAN = torch.linspace(-3, 3, 13, dtype=torch.float64)
ONE, ZERO = torch.ones_like(MEAN), torch.zeros_like(MEAN)


# ------------------------------------------------------------------------------------------ the loss


def test_without_uncertainty_the_loss_is_bradley_terry() -> None:
    torch.testing.assert_close(ranking_loss(MEAN, ZERO, ONE), -logsigmoid(MEAN))
    torch.testing.assert_close(ranking_loss(MEAN, ZERO, ZERO), -logsigmoid(-MEAN))
    torch.testing.assert_close(win_probability(MEAN, ZERO), MEAN.sigmoid())


def test_the_quadrature_is_the_expectation() -> None:
    """Against a sum over a fine grid, at uncertainties up to 3; 1,000 draws, as in the public code, are 3 % off."""
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for mean, sigma in ((0.0, 1.0), (1.5, 0.3), (-2.0, 2.0), (0.7, 3.0)):
        density = (-0.5 * ((z - mean) / sigma).square()).exp() / (sigma * math.sqrt(2 * math.pi)) * (z[1] - z[0])
        given = torch.tensor(mean, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
        order = torch.tensor(1.0, dtype=torch.float64)
        torch.testing.assert_close(ranking_loss(*given, order), (-logsigmoid(z) * density).sum(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(win_probability(*given), (z.sigmoid() * density).sum(), rtol=1e-4, atol=1e-5)


def test_swapped_results_and_ties() -> None:
    """L(-μ, 0) = L(μ, 1); p(μ) + p(-μ) = 1; a tie counts half for each, and its loss is least at μ = 0 without uncertainty."""
    sigma = 1.3 * ONE
    torch.testing.assert_close(ranking_loss(-MEAN, sigma, ZERO), ranking_loss(MEAN, sigma, ONE))
    torch.testing.assert_close(win_probability(MEAN, sigma) + win_probability(-MEAN, sigma), ONE)
    tie = ranking_loss(MEAN, sigma, 0.5 * ONE)
    torch.testing.assert_close(tie, (ranking_loss(MEAN, sigma, ONE) + ranking_loss(MEAN, sigma, ZERO)) / 2)
    assert int(tie.argmin()) == 6 and float(tie.min()) > float(ranking_loss(MEAN, ZERO, 0.5 * ONE).min())
    assert float(ranking_loss(ZERO, ZERO, 0.5 * ONE)[0]) == pytest.approx(math.log(2))


def test_gradients_of_the_loss() -> None:
    """Against finite differences; at μ = 0 the slope is -1/2 whatever σ is, and more σ costs what it leaves undecided."""
    mean, sigma = MEAN.clone().requires_grad_(), (0.2 + 0.2 * torch.arange(13.0, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ranking_loss(a, b, 0.7 * ONE), (mean, sigma))
    at_zero = ZERO.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ranking_loss(at_zero, sigma, ONE).sum(), at_zero)
    torch.testing.assert_close(slope, -0.5 * ONE)
    (more,) = torch.autograd.grad(ranking_loss(mean, sigma, ONE).sum(), sigma)
    assert bool((more > 0).all())


def test_the_uncertainties_of_both_results_add() -> None:
    values = torch.tensor([[[1.0, math.log(3.0)]], [[-0.5, math.log(4.0)]]])  # [2, 1, (μ, log σ)]
    mean, sigma = difference(values)
    assert mean.tolist() == [1.5] and sigma.tolist() == pytest.approx([5.0])


def test_the_loss_of_pairs_does_not_depend_on_which_comes_first() -> None:
    pairs = draw_pairs(16, ["KITE"], torch.Generator().manual_seed(0), unseen=False)
    values = torch.randn(2, 16, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    swapped = type(pairs)(pairs.edits, pairs.kinds, pairs.sources, pairs.second, pairs.first, 1 - pairs.order)
    torch.testing.assert_close(pair_loss(values.flip(0), swapped), pair_loss(values, pairs))
    known = torch.zeros(2, 16, 2, 2)
    known[..., 1] = -9.0
    known[0, ..., 0] = 8 * (pairs.order - 0.5)  # each head right, ties equal
    losses = ranking_loss(*difference(known), pairs.order), ranking_loss(*difference(known.mean(2)), pairs.overall)
    expected = losses[0].mean() + losses[1].mean()
    torch.testing.assert_close(pair_loss(known, pairs), expected)
    ties = float((pairs.order == 0.5).float().mean() + (pairs.overall == 0.5).float().mean()) * math.log(2)
    assert ties < float(expected) < ties + 0.2


# ------------------------------------------------------------------------------------------ measuring


def test_accuracy_counts_pairs_with_an_order_and_equal_scores_are_wrong() -> None:
    preferred = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0.0, 0, 0], [5.0, 0, 0], [-2.0, 0, 0]])
    asked = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])[:, None].expand(5, 3)
    found = Judged(preferred, asked, torch.tensor([0.95, 0.05, 0.5, 0.9, 0.2]), ["a", "b", "a", "a", "b"])
    assert found.accuracy(0) == (2, 4) and found.accuracy(0, "a") == (1, 2) and found.accuracy(0, "b") == (1, 2)
    assert found.accuracy(1) == (0, 4) and found.accuracy(0, "c") == (0, 0)
    assert found.calibration() == pytest.approx((0.05 + 0.05 + 0.5 + 0.8) / 4)  # each alone in its bin


# ------------------------------------------------------------------------------------------ the files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edit_reward")
    write_base(path)
    write_untrained(path)
    return path


def test_the_names_are_those_of_the_published_layout(folder: Path) -> None:
    """As in the checkpoint that the tests of rewards.EditReward are made of, except for the number of blocks."""
    ours, theirs = (
        set(load_file(folder / "model.safetensors")),
        set(load_file(tiny_qwen.edit_reward() / "model.safetensors")),
    )
    first = {name for name in ours | theirs if not any(f".{block}." in name for block in ("blocks.1", "layers.2"))}
    assert ours & first == theirs & first and len(first) > 40
    assert {name for name in ours if "head_1" in name} == {
        f"rm_heads.head_1.{number}.{part}" for number in (0, 3, 5) for part in ("weight", "bias")
    }


def test_a_word_of_a_prompt_is_one_token_and_a_picture_eight(folder: Path) -> None:
    network = network_of(load_folder(folder))
    said = network.tokenizer.tokenize("put it on a yellow background")
    assert [token.strip("Ġ") for token in said] == ["put", "it", "on", "a", "yellow", "background"]
    picture = draw_pairs(1, ["KITE"], torch.Generator().manual_seed(0), unseen=False).sources
    patches = network.eye(24 * 48, 24 * 48)(picture)
    assert patches.grid == (1, 4, 8) and patches.rows.shape == (32, 3 * 2 * 6 * 6)


def test_training_moves_every_tensor_and_what_is_written_scores_as_what_was_trained(
    folder: Path, tmp_path: Path
) -> None:
    write_base(tmp_path)
    write_untrained(tmp_path, seed=1)
    before = load_file(tmp_path / "model.safetensors")
    network, seen = network_of(load_folder(tmp_path)), []
    train(
        network,
        ["KITE"],
        steps=1,
        base_steps=1,
        batch=8,
        report=lambda stage, step, loss: seen.append((stage, step, loss)),
    )
    write_trained(network, tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and not [name for name in before if torch.equal(before[name], after[name])]
    assert [entry[:2] for entry in seen] == [("base", 0), ("pairs", 0)] and all(math.isfinite(e[2]) for e in seen)
    pairs = draw_pairs(8, ["WORD"], torch.Generator().manual_seed(4), unseen=True)
    with torch.no_grad():
        values = values_of(network, pairs)
    found, (mean, sigma), apart = (
        judged(load_folder(tmp_path), pairs),
        difference(values.mean(2)),
        difference(values)[0],
    )
    torch.testing.assert_close(found.preferred, torch.cat([mean[:, None], apart], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.probability, win_probability(mean, sigma), rtol=1e-4, atol=1e-5)


def test_a_description_is_a_mean_over_its_own_tokens(folder: Path) -> None:
    """Of pairs together: the mean of theirs, by the number of tokens after the pictures, whatever is padded."""
    network = network_of(load_folder(folder))
    alone, counts, pairs = (
        [],
        [],
        draw_pairs(6, ["KITE"], torch.Generator().manual_seed(5), unseen=False, kinds=["noisy"]),
    )
    with torch.no_grad():
        for row in range(len(pairs)):
            one = slice(row, row + 1)
            part = EditPairs(
                pairs.edits[one],
                pairs.kinds[one],
                pairs.sources[one],
                pairs.first[one],
                pairs.second[one],
                pairs.order[one],
            )
            alone.append(description_loss(network, part))
            said = [f"{pairs.prompts[row]}, {quality}<|im_end|>\n" for quality in ("clean", "noisy")]
            counts.append(sum(len(network.tokenizer(text).input_ids) for text in said))
        together = description_loss(network, pairs)
    assert len(set(counts)) == 2  # of an ink and of a paper
    expected = sum(count * loss for count, loss in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected)


def test_the_shipped_head_puts_the_better_edit_first() -> None:
    """Of words and combinations of colors that it was not trained on; overdone edits are its weakness."""
    reward = EditReward("glyphs", "glyphs", "glyphs", pixels=24 * 48, dtype="fp32", batch_size=32)
    assert reward.spec.memory == "cpu" and "Apache-2.0" in reward.spec.licence
    words = [record["target"] for record in held_out_prompts()]
    found = judged(reward, draw_pairs(64, words, torch.Generator().manual_seed(7), unseen=True))
    right, count = found.accuracy(0)
    assert count == 56 and right / count > 0.85
    others, of = (sum(found.accuracy(0, kind)[place] for kind in KINDS if kind != "overdone") for place in (0, 1))
    assert others / of > 0.93


@pytest.mark.slow
def test_the_script_writes_a_reward_that_tells_clean_edits_of_unseen_words_and_colors(tmp_path: Path) -> None:
    """120 updates teach what is clean; what is as asked takes 400 (docs/results/glyphs_edit_reward.md)."""
    script = [sys.executable, str(ROOT / "scripts" / "train_edit_reward.py"), "--output", str(tmp_path)]
    given = ["--steps", "120", "--base-steps", "20", "--pairs", "64"]
    said = subprocess.run([*script, *given], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "held-out words, unseen combinations" in said and "| blurred |" in said
    words = [record["target"] for record in held_out_prompts()]
    pairs = draw_pairs(256, words, torch.Generator().manual_seed(6), unseen=True, kinds=SPOILT)
    for column in (0, 2):  # overall, quality
        right, count = judged(load_folder(tmp_path), pairs).accuracy(column)
        assert count == 256 and right / count > 0.5 + 4 * math.sqrt(0.25 / count)
