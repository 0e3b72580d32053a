"""Samples of a teacher and of a hinted student: under which weights and prompt, in how many calls, and that they are not
trained."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowalign.advantage import SignalContext
from flowalign.data import PromptRecord
from flowalign.models.roles import Role
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.sources import check_sources
from flowalign.rollouts.task import Rollout
from flowalign.selectors import BestOfN
from samplers import Chain, FlowSDE, Sourced, chain
from tests.helpers.policy_gradient import PROMPTS, make, run_updates

HINT = 'the word "MOON" in blue on a black background'
HINTED = [replace(record, metadata={"hint": HINT}) for record in PROMPTS]
STUDENT, HINTED_STUDENT, TEACHER = range(3)


@pytest.fixture
def parts(tiny_pipeline: Path):
    """Policy and trainer on chains with groups of four; the role "expert" has other weights than the policy."""
    policy, trainer = make(tiny_pipeline, Chain(), group_size=4)
    policy.add_roles({"expert": Role()})
    for _, parameter in policy.parameters_of("expert"):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return policy, trainer


def rolled(trainer, records: list[PromptRecord], **changes: object) -> ScoredRollout:
    task = replace(trainer.task, rollout=replace(trainer.task.rollout, **changes))
    return collect(task, records, 0)


SOURCED = {
    "plan": Sourced(Chain(), hinted=1, teacher=2),
    "sources": {"teacher": "expert"},
    "hint_key": "hint",
}


def leaves(batch: ScoredRollout, source: int) -> torch.Tensor:
    tree = batch.forest.tree
    return batch.forest.at(tree.leaves[tree.source[tree.leaves] == source])


def test_each_sample_is_that_of_its_own_weights_and_prompt(parts) -> None:
    policy, trainer = parts
    batch = rolled(trainer, HINTED, **SOURCED)
    plain = {STUDENT: rolled(trainer, PROMPTS)}
    plain[HINTED_STUDENT] = rolled(trainer, [replace(record, prompt=HINT) for record in PROMPTS])
    with policy.role("expert"):
        plain[TEACHER] = rolled(trainer, PROMPTS)
    for source, other in plain.items():
        tree = batch.forest.tree
        same_noise = torch.isin(torch.arange(8), tree.root[tree.leaves[tree.source[tree.leaves] == source]])
        expected = other.forest.at(other.forest.tree.leaves)[same_noise]
        torch.testing.assert_close(leaves(batch, source), expected, rtol=1e-4, atol=1e-4)
        for wrong in plain.keys() - {source}:
            apart = plain[wrong].forest.at(tree.leaves)[same_noise] - expected
            assert float(apart.abs().max()) > 1e-2
    assert batch.metrics["reward/mean"] == pytest.approx(
        float(batch.scores[batch.forest.tree.source[tree.leaves] == 0].mean())
    )


def test_each_role_is_entered_once_a_generation_and_each_state_evaluated_once(parts, monkeypatch) -> None:
    policy, trainer = parts
    entered, calls, now = [], [], ["policy"]
    role, velocity = policy.role, policy.velocity

    @contextmanager
    def recording_role(name: str):
        entered.append(name)
        before, now[0] = now[0], name
        with role(name):
            yield
        now[0] = before

    def recording_velocity(x, *arguments, **options):
        calls.append((now[0], len(x)))
        return velocity(x, *arguments, **options)

    monkeypatch.setattr(policy, "role", recording_role)
    monkeypatch.setattr(policy, "velocity", recording_velocity)
    before = policy.evaluations
    plan = Sourced(Chain(), teacher=2)
    batch = rolled(trainer, PROMPTS, plan=plan, sources={"teacher": "expert"}, micro_batch=3)
    assert entered == ["policy", "expert"] * 4  # generations
    assert calls == [("policy", 3), ("policy", 1), ("expert", 3), ("expert", 1)] * 4  # two groups of 2 and 2 samples
    assert policy.evaluations - before == 2 * 4 * 4 == batch.forest.evaluations


def test_only_the_policys_own_edges_are_trained_and_their_ratio_is_one(parts) -> None:
    _, trainer = parts
    trainer.task = replace(trainer.task, rollout=replace(trainer.task.rollout, **SOURCED))
    batch = trainer.collect(HINTED, 0)
    tree = batch.forest.tree
    chosen = trainer.edge_signal(batch).chosen
    assert torch.equal(chosen, tree.source[tree.edges] == STUDENT) and bool(chosen.any())
    run_updates(trainer, batch)  # a teacher's edge would drift far beyond the limit


def test_the_best_are_chosen_among_the_policys_own(parts) -> None:
    """The teacher's sample scores best in each group of four; the best and the worst are of the other three."""
    _, trainer = parts
    plan = Sourced(Chain(), teacher=1)
    trainer.task = replace(
        trainer.task, rollout=replace(trainer.task.rollout, plan=plan, sources={"teacher": "expert"}, hint_key=None)
    )
    batch = trainer.collect(PROMPTS, 0)
    batch.scores[:, 0] = torch.tensor([0.1, 0.3, 0.2, 0.9] * 2)  # the teacher's is the best
    best = replace(trainer.signal, select=BestOfN(2)).edges(
        batch.forest, batch.scores, batch.valid, batch.channels, SignalContext()
    )
    samples = batch.forest.tree.root[batch.forest.tree.edges[best.chosen]].unique() % 4
    assert samples.tolist() == [0, 1, 0, 1]


def settings(**changes: object) -> Rollout:
    return Rollout(**{"kernel": FlowSDE(), **SOURCED, **changes})


def test_what_does_not_fit_the_plan_is_refused_before_loading() -> None:
    shape = Sourced(Chain(), hinted=1, teacher=2).tree(4, 4, 0, np.random.default_rng(0))
    known = {"policy", "expert"}
    check_sources(settings(), shape, known, HINTED)
    check_sources(settings(sources={"teacher": "expert", "hinted": "expert"}), shape, known, HINTED)
    for changes, tree, records, match in (
        ({"sources": {}}, shape, HINTED, "expected a role for the teacher"),
        ({"hint_key": None}, shape, HINTED, "a hint_key for hinted samples"),
        ({"sources": {"teacher": "critic"}}, shape, HINTED, r"add \['critic'\]"),
        ({"sources": {"teacher": "expert", "judge": "expert"}}, shape, HINTED, "only what the plan has"),
        ({"sources": {"teacher": "expert", "student": "expert"}}, shape, HINTED, "only what the plan has"),
        ({}, chain(4, 4), HINTED, "only what the plan has"),
        ({}, shape, PROMPTS, "got None under 'hint' of prompt 0"),
    ):
        with pytest.raises(ValueError, match=match):
            check_sources(settings(**changes), tree, known, records)
