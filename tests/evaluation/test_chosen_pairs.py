"""The pairs that the report shows: most gained, most lost, and some by chance."""

import torch

from flowalign.evaluation.chosen_pairs import CHANCE, GAINS, LOSSES, chosen_pairs

NAN = torch.nan


def test_the_largest_gains_and_losses_come_first_and_invalid_pairs_in_neither() -> None:
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, NAN, 0.0, 0.0])
    tuned = torch.tensor([0.1, -0.5, 0.3, 0.0, 0.3, 9.0, NAN, -0.1])
    chosen = chosen_pairs(base, tuned, each=3)
    assert list(chosen) == [GAINS, LOSSES, CHANCE]
    assert chosen[GAINS] == [2, 4, 0] and chosen[LOSSES] == [1, 7]  # equal ones in their order; ties are in neither
    assert chosen_pairs(base, base)[GAINS] == chosen_pairs(base, base)[LOSSES] == []


def test_those_by_chance_do_not_depend_on_the_scores_and_reach_every_pair() -> None:
    scores = torch.arange(40.0)
    drawn = chosen_pairs(scores, -scores)[CHANCE]
    assert drawn == chosen_pairs(scores, scores + 1)[CHANCE] and len(set(drawn)) == 4
    reached = {row for seed in range(80) for row in chosen_pairs(scores, scores, seed=seed)[CHANCE]}
    assert reached == set(range(40))
    assert chosen_pairs(scores[:2], scores[:2])[CHANCE] == [0, 1]
