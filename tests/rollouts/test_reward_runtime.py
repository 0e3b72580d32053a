"""Rewards at work in a rollout: whole groups, scoring beside the rollout, groups rolled out again, states completed."""

import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowalign.credit import Process
from flowalign.data import PromptRecord
from flowalign.glyphs import train_prompts
from flowalign.models import Size, load_policy
from flowalign.rollouts.collect import collect
from flowalign.rollouts.completions import completed, cost_of_completions
from flowalign.rollouts.task import Rollout, Task
from rewards import PARM, GroupDiversity, OnCompletion, RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import ODE, Branch, Chain, Deterministic, FlowSDE, Selected, rollout
from tests.helpers.gaussian import gaussian_velocity
from tests.helpers.judge_server import bright_judge
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.policy_gradient import PROMPTS, make

ELSEWHERE = RewardSpec(elsewhere=True)
FOUR = [PROMPTS[0], PROMPTS[1], PROMPTS[0], replace(PROMPTS[1], uid=7)]  # one prompt twice


def task_of(pipeline: Path, plan, reward, micro_batch: int = 64, kernel=None, **settings):
    _, trainer = make(pipeline, plan, kernel, reward=reward)
    process = settings.pop("process_rewards", ())
    rollout_settings = replace(trainer.task.rollout, micro_batch=micro_batch, **settings)
    return replace(trainer.task, rollout=rollout_settings, process_rewards=process)


def test_a_groupwise_reward_gets_whole_groups_whatever_the_micro_batch(tiny_pipeline: Path) -> None:
    seen: list[list[int]] = []

    def of_group(batch: RewardBatch) -> RewardOutput:
        seen.append(batch.group_ids)
        assert len(batch) == 3 * len(set(batch.group_ids))
        return GroupDiversity()(batch)

    spec = GroupDiversity().spec
    whole = collect(task_of(tiny_pipeline, Chain(), Plain(of_group, spec)), FOUR, 0)
    assert sorted(seen.pop()) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    parts = collect(task_of(tiny_pipeline, Chain(), Plain(of_group, spec), micro_batch=4), FOUR, 0)
    assert [set(groups) for groups in seen] == [{0}, {1}, {2}, {3}]
    torch.testing.assert_close(parts.scores, whole.scores)
    assert bool(whole.valid.all()) and whole.scores[:, 0].min() > 0


@pytest.mark.parametrize("plan", [Chain(), Branch(3)], ids=["chain", "tree"])
def test_scoring_elsewhere_runs_beside_the_rollout_and_changes_no_score(tiny_pipeline: Path, plan) -> None:
    """The reward holds its first batch back until the second set of groups has been rolled out."""
    further, threads = threading.Event(), set()

    def held_back(batch: RewardBatch) -> RewardOutput:
        threads.add(threading.current_thread())
        assert further.wait(60) and batch.images.device.type == "cpu"
        return brightness(batch)

    serial = collect(task_of(tiny_pipeline, plan, Plain(brightness), micro_batch=4), FOUR, 0)
    task = task_of(tiny_pipeline, plan, Plain(held_back, ELSEWHERE), micro_batch=4)
    rolled = []

    def roll(*arguments, **options):
        rolled.append(len(arguments[1]))
        forest = rollout(*arguments, **options)
        if len(rolled) == 2:  # a serial run would wait for the reward before, for ever
            further.set()
        return forest

    beside = collect(task, FOUR, 0, roll=roll)
    assert len(rolled) == 4 and len(threads) == 1 and threading.main_thread() not in threads
    torch.testing.assert_close(beside.scores, serial.scores)
    for name in ("parent", "group", "local", "index"):
        assert torch.equal(vars(beside.forest.tree)[name], vars(serial.forest.tree)[name])
    nodes = serial.forest.kept.nonzero().flatten()
    torch.testing.assert_close(beside.forest.at(nodes), serial.forest.at(nodes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside.forest.log_prob, serial.forest.log_prob, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert beside.forest.evaluations == serial.forest.evaluations
    assert beside.metrics["time/reward_hidden"] > 0 and "time/reward_hidden" not in serial.metrics


@pytest.mark.parametrize("plan", [Chain(), Branch(3), Selected(Chain(), {2: 2})], ids=["chain", "tree", "selected"])
def test_chunks_of_groups_change_nothing_but_how_much_is_rolled_out_at_once(tiny_pipeline: Path, plan) -> None:
    """And a chunk is decoded and scored before the next one is rolled out."""
    events: list[int | str] = []

    def seen(batch: RewardBatch) -> RewardOutput:
        events.append("scored")
        return brightness(batch)

    def roll(*arguments, **options):
        events.append(arguments[3].num_groups)
        return rollout(*arguments, **options)

    whole = collect(task_of(tiny_pipeline, plan, Plain(brightness)), FOUR, 0)
    parts = collect(task_of(tiny_pipeline, plan, Plain(seen), chunk=3), FOUR, 0, roll=roll)
    assert [event for event in events if event != "scored"] == [3, 1] and events.index(1) > events.index("scored")
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-4, atol=1e-5)
    for name in ("parent", "group", "local", "index"):
        assert torch.equal(vars(parts.forest.tree)[name], vars(whole.forest.tree)[name])
    nodes = whole.forest.kept.nonzero().flatten()
    torch.testing.assert_close(parts.forest.at(nodes), whole.forest.at(nodes), rtol=1e-4, atol=1e-5)
    assert parts.forest.evaluations == whole.forest.evaluations


@pytest.mark.slow
def test_a_reward_as_slow_as_the_rollout_is_hidden_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Glyphs, 16 groups of 8 in sets of 2, a reward that sleeps for as long per image as the rollout takes: overlapped, an
    iteration takes 1 + 1/8 of the rollout, serially 2. The ratio is printed."""
    policy = load_policy("glyphs")
    prompts = [PromptRecord(i, record["prompt"]) for i, record in enumerate(train_prompts()[:16])]
    settings = Rollout(Chain(), FlowSDE(), groups=16, group_size=8, num_inference_steps=6, micro_batch=16)
    per_image = 0.0

    def sleeping(batch: RewardBatch) -> RewardOutput:
        time.sleep(per_image * len(batch))
        return brightness(batch)

    def seconds(spec: RewardSpec) -> float:
        task = Task(policy, Plain(sleeping, spec), settings, 0, Size(24, 48))
        began = time.perf_counter()
        collect(task, prompts, 0)
        return time.perf_counter() - began

    seconds(RewardSpec())
    ratios = []
    for _ in range(5):
        per_image = 0.0
        rolled = seconds(ELSEWHERE)
        per_image = rolled / 128
        ratios.append(seconds(ELSEWHERE) / seconds(RewardSpec()))
    with capsys.disabled():
        print(
            f"\noverlapped / serial: {sorted(ratios)[2]:.2f} (of {', '.join(f'{ratio:.2f}' for ratio in ratios)}); ideal 0.56"
        )
    assert sorted(ratios)[2] < 0.9


def test_what_a_reward_elsewhere_raises_ends_the_rollout(tiny_pipeline: Path) -> None:
    def broken(batch: RewardBatch) -> RewardOutput:
        raise OSError("the server is gone")

    with pytest.raises(RewardError, match="the server is gone"):
        collect(task_of(tiny_pipeline, Chain(), Plain(broken, ELSEWHERE), micro_batch=3), FOUR, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "reward plain" and not thread.daemon]


class Flaky:
    """Brightness, but the second group has no score for its first sample, for the first `times` times it is asked."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        output = brightness(batch)
        rows = [row for row, group in enumerate(batch.group_ids) if group == 1]
        if rows:
            self.asked += 1
            if self.asked <= self.times:
                output.valid[rows[0]] = False
        return output


@pytest.mark.parametrize("spec", [RewardSpec(), ELSEWHERE], ids=["here", "elsewhere"])
def test_a_group_without_a_score_is_rolled_out_again_with_other_noise(tiny_pipeline: Path, spec) -> None:
    plain = collect(task_of(tiny_pipeline, Chain(), Plain(brightness)), FOUR, 0)
    masked = collect(task_of(tiny_pipeline, Chain(), Plain(Flaky(9), spec)), FOUR, 0)
    assert int((~masked.valid).sum()) == 1 and "cost/refilled_groups" not in masked.metrics
    again = collect(task_of(tiny_pipeline, Chain(), Plain(Flaky(2), spec), refill=3), FOUR, 0)
    assert bool(again.valid.all()) and again.metrics["cost/refilled_groups"] == 2
    second = again.forest.tree.group[again.forest.tree.leaves] == 1
    torch.testing.assert_close(again.scores[~second], plain.scores[~second])
    assert (again.scores[second] - plain.scores[second]).abs().min() > 1e-6
    roots = again.forest.tree.group[: again.forest.tree.num_roots]
    first = again.forest.at(torch.arange(len(roots)))
    assert len(first.flatten(1).unique(dim=0)) == len(roots)  # nor is it the noise of a prompt that occurs twice
    images = make(tiny_pipeline, Chain())[0].decode(again.forest.at(again.forest.tree.leaves))
    torch.testing.assert_close(again.scores[:, 0], images.mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert again.metrics["cost/rollout_per_image"] == pytest.approx(plain.metrics["cost/rollout_per_image"] * 6 / 4)
    given_up = collect(task_of(tiny_pipeline, Chain(), Plain(Flaky(9), spec), refill=1), FOUR, 0)
    assert int((~given_up.valid).sum()) == 1


def dull(groups: set[int], times: int, **spec) -> Plain:
    """Brightness, without a score for the groups in its first `times` batches that hold one of them."""
    asked = []

    def answer(batch: RewardBatch) -> RewardOutput:
        output, rows = brightness(batch), [row for row, group in enumerate(batch.group_ids) if group in groups]
        asked.extend([1] if rows else [])
        output.valid[rows if len(asked) <= times else []] = False
        return output

    return Plain(answer, RewardSpec(**spec))


def test_how_many_may_fail_is_judged_after_the_refills(tiny_pipeline: Path) -> None:
    """A refill asks again about the worst groups alone, most of which may fail again: no more than before."""
    once = collect(task_of(tiny_pipeline, Chain(), dull({1}, 9), refill=0), FOUR, 0)
    again = collect(task_of(tiny_pipeline, Chain(), dull({1}, 9), refill=2), FOUR, 0)
    assert torch.equal(again.valid, once.valid) and int((~again.valid).sum()) == 3
    assert again.metrics["cost/refilled_groups"] == 2
    mended = collect(task_of(tiny_pipeline, Chain(), dull({0, 1, 2, 3}, 1), refill=1), FOUR, 0)
    assert bool(mended.valid.all())
    with pytest.raises(RewardError, match=r"9 of 12 samples have no score.*The first, sample 0 .*KITE"):
        collect(task_of(tiny_pipeline, Chain(), dull({0, 1, 2}, 9), refill=1), FOUR, 0)


def test_how_many_states_may_fail_is_judged_over_all_sets_of_groups(tiny_pipeline: Path) -> None:
    """Where the run's reward lives decides how many groups are rolled out at once, not whether a process reward fails."""
    for spec in (RewardSpec(), ELSEWHERE):
        reward, process = Plain(brightness, spec), dull({1}, 9, scope="completion")
        batch = collect(task_of(tiny_pipeline, Chain(), reward, micro_batch=4, process_rewards=[process]), FOUR, 0)
        groups = batch.forest.tree.group[batch.forest.scores["plain"].isfinite()]
        assert sorted(groups.unique().tolist()) == [0, 2, 3]
    process = dull({0, 1, 2}, 99, scope="completion")
    with pytest.raises(RewardError, match="36 of 48 samples have no score"):
        collect(task_of(tiny_pipeline, Chain(), reward, micro_batch=4, process_rewards=[process]), FOUR, 0)


def test_a_rollout_that_ends_early_asks_for_nothing_more(tiny_pipeline: Path) -> None:
    """Ctrl-C while the first set is being scored and the second waits: the rewards are closed next."""
    going, asked, threads = threading.Event(), [], []

    def held_back(batch: RewardBatch) -> RewardOutput:
        threads.append(threading.current_thread())
        asked.append(set(batch.group_ids))
        assert going.wait(60)
        return brightness(batch)

    def roll(*arguments, **options):
        rolled.append(1)
        if len(rolled) == 4:
            raise KeyboardInterrupt
        return rollout(*arguments, **options)

    rolled: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        collect(task_of(tiny_pipeline, Chain(), Plain(held_back, ELSEWHERE), micro_batch=4), FOUR, 0, roll=roll)
    going.set()
    for thread in threads:
        thread.join(60)
    assert asked in ([], [{0}]) and not any(thread.is_alive() for thread in threads)


@dataclass(frozen=True)
class Mean:
    """The mean of the latents it is given."""

    name: str = "mean"
    spec = RewardSpec(("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert not bool(batch.sigma.any())
        return RewardOutput(batch.latents.flatten(1).mean(1), torch.ones(len(batch), dtype=torch.bool))


@pytest.mark.parametrize(("steps", "more"), [(1, 0), (2, 1), (None, None)])
def test_completions_of_a_linear_gaussian_flow_are_exact(steps: int | None, more: int | None) -> None:
    """x0-predictions are the posterior mean; Euler's completion is a product of known factors, and costs what it says."""
    velocity, slope = gaussian_velocity(0.5, 0.8)
    plan, sigmas = Chain(), torch.linspace(1, 0, 6)
    tree, rows = plan.tree(5, 4, 0, None), []

    def counted(x, sigma, root):
        rows.append(len(x))
        return velocity(x, sigma, root)

    draws = torch.Generator().manual_seed(0)
    forest = rollout(
        velocity, torch.randn(4, 3, generator=draws), sigmas, tree, FlowSDE(),
        lambda tree, nodes: torch.randn(len(nodes), 3, generator=draws), keep_velocities=True,
    )  # fmt: skip
    nodes = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    found = completed(forest, nodes, steps, counted, micro_batch=3)
    states, sigma, expected = forest.at(nodes).double(), forest.sigma(nodes).double()[:, None], []
    if steps == 1:
        gain = (1 - sigma) * 0.64 / ((1 - sigma) ** 2 * 0.64 + sigma**2)
        torch.testing.assert_close(found.double(), 0.5 + gain * (states - (1 - sigma) * 0.5), rtol=1e-5, atol=1e-5)
    for x, index in zip(states, tree.index[nodes].tolist(), strict=True):
        middle = {1: [], 2: [index + (5 - index + 1) // 2], None: list(range(index + 1, 5))}[steps]
        levels = sorted({index, *middle, 5})
        for here, there in pairwise(levels):
            at = sigmas[here].double()
            x = x + (sigmas[there].double() - at) * (-0.5 + slope(at) * (x - (1 - at) * 0.5))
        expected.append(x)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    states_, evaluations = cost_of_completions(tree, steps)
    assert (states_, evaluations) == (len(nodes), sum(rows)) and max(rows, default=0) <= 3
    if more is not None:  # the state before the last step has one step left, so no second one
        assert sum(rows) == more * sum(index < 4 for index in tree.index[nodes].tolist())


def test_increments_of_a_completion_reward_telescope(tiny_pipeline: Path) -> None:
    """Credit "gain" by a reward of full ODE completions sums to R(end) − R(completion of the start)."""
    process = OnCompletion(Mean(), steps=None, max_sigma=1.0)
    task = task_of(tiny_pipeline, Chain(), Mean(), process_rewards=[process])
    batch = collect(task, PROMPTS, 0)
    forest, tree = batch.forest, batch.forest.tree
    gains = Process("x0_mean", "gain").assign(forest, batch.scores, batch.valid, batch.channels)
    assert bool(gains.valid.all()) and "old" not in forest.velocities
    per_sample = torch.zeros(len(tree.leaves), dtype=torch.float64)
    edge, leaf = tree.leaf_of_edge
    per_sample.index_add_(0, leaf, gains.values[edge, 0])
    first = forest.scores["x0_mean"][tree.root[tree.leaves]]  # roots are the first nodes
    torch.testing.assert_close(per_sample, (batch.scores[:, 0] - first).double(), rtol=1e-4, atol=1e-6)
    ode = collect(task_of(tiny_pipeline, Deterministic(), Mean(), kernel=ODE()), PROMPTS, 0)
    torch.testing.assert_close(
        first, ode.scores[:, 0], rtol=1e-3, atol=1e-4
    )  # the completion of the start is the ODE's sample
    states, rows = cost_of_completions(tree, None)
    assert batch.metrics["cost/decodes_per_image"] == 0
    assert batch.metrics["cost/rollout_per_image"] == (forest.evaluations + rows) / 6
    assert batch.metrics["cost/reward_calls_per_image"] == states / 6 + 1


def test_rewards_of_as_many_steps_share_their_completions(tiny_pipeline: Path) -> None:
    """Each state is completed once, up to the larger max_sigma; each reward scores what it would alone."""
    wide, narrow = (OnCompletion(Mean(), 2, sigma, prefix) for sigma, prefix in ((1.0, "wide_"), (0.7, "narrow_")))

    def of(*rewards: OnCompletion):
        return collect(task_of(tiny_pipeline, Chain(), Mean(), process_rewards=rewards), PROMPTS, 0)

    both, tree = of(narrow, wide), of(wide).forest.tree
    for reward in (wide, narrow):
        assert torch.equal(
            both.forest.scores[reward.name].nan_to_num(9.0), of(reward).forest.scores[reward.name].nan_to_num(9.0)
        )
    assert both.forest.scores["narrow_mean"].isfinite().sum() < both.forest.scores["wide_mean"].isfinite().sum()
    rows = cost_of_completions(tree, 2)[1]
    assert rows > 0 and both.metrics["cost/rollout_per_image"] == (both.forest.evaluations + rows) / 6


def test_noisier_states_than_the_reward_takes_are_not_decoded(tiny_pipeline: Path) -> None:
    process = OnCompletion(Plain(brightness), max_sigma=0.6)
    batch = collect(task_of(tiny_pipeline, Chain(), Plain(brightness), process_rewards=[process]), PROMPTS, 0)
    forest, tree = batch.forest, batch.forest.tree
    ends = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    scored = forest.scores["x0_plain"].isfinite().nonzero().flatten()
    assert scored.tolist() == ends[forest.sigma(ends) <= 0.6].tolist() and 0 < len(scored) < len(ends)
    assert batch.metrics["cost/decodes_per_image"] == 1 + len(scored) / 6


def test_a_selection_ranks_by_its_own_reward(tiny_pipeline: Path) -> None:
    """The darkest candidate stays, though the run's reward is brightness; the run's reward sees finished samples only."""
    plan = Selected(Chain(), {0: 1}, preview_steps=2)
    trained = Plain(brightness)

    def darkness(batch: RewardBatch) -> RewardOutput:
        output = brightness(batch)
        return replace(output, scores=-output.scores, components={})

    darkest = collect(task_of(tiny_pipeline, plan, trained, preview_reward=Plain(darkness)), PROMPTS, 0)
    assert [len(batch) for batch in trained.seen] == [2]
    brightest = collect(task_of(tiny_pipeline, plan, Plain(brightness)), PROMPTS, 0)
    for batch in (darkest, brightest):
        previews, tree = batch.forest.scores["preview"], batch.forest.tree
        for leaf in tree.leaves:
            candidates = previews[(tree.group == tree.group[leaf]) & (tree.parent < 0)]
            assert len(candidates) == 3 and candidates.max() == previews[tree.root[leaf]]
    assert bool((darkest.forest.scores["preview"][:6] == -brightest.forest.scores["preview"][:6]).all())


def test_parm_selects_by_the_potential_that_a_judge_sees(tiny_pipeline: Path) -> None:
    """The judge says yes the more, the brighter a picture is; the run's reward is asked about what is left only."""
    plan, trained = Selected(Chain(), {0: 1}, preview_steps=1), Plain(brightness)
    parm = PARM(bright_judge(), sigma=0.5, require_clear=False)
    batch = collect(task_of(tiny_pipeline, plan, trained, preview_reward=parm), PROMPTS, 0)
    previews, tree = batch.forest.scores["preview"], batch.forest.tree
    assert [len(asked) for asked in trained.seen] == [2] and bool(((previews[:6] > 0) & (previews[:6] < 1)).all())
    for leaf in tree.leaves:
        candidates = previews[(tree.group == tree.group[leaf]) & (tree.parent < 0)]
        assert candidates.max() == previews[tree.root[leaf]]
