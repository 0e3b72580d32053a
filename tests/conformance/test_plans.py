"""Every plan of samplers/plans: sound trees, honest forecasts, groups of the size asked for, the same in YAML; and every
position of a window inside its bounds."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

import samplers.plans
from samplers import (
    ODE,
    SOURCES,
    Chain,
    Cost,
    KeyedNoise,
    Plan,
    Position,
    Tree,
    Window,
    plain_sigmas,
    rollout,
    sampled,
)
from samplers.tree_rules import COLUMNS, check_columns
from tests.helpers.discovery import dataclasses_of, differences, example

# arguments of the plans that have no defaults for all of them
EXAMPLES: dict[str, dict[str, Any]] = {
    "Probed": {"plan": Chain()},
    "Compressed": {"plan": Window(2)},
    "Sourced": {"plan": Chain(), "hinted": 1, "teacher": 2},
    "Selected": {"plan": Chain(), "counts": {3: 12}},
    "Leveled": {"plan": Chain(), "factors": (0.5,) * 12},
}
WITHOUT_EDGES = {"Deterministic"}
PLANS = dataclasses_of(samplers.plans, "forecast")
POSITIONS = dataclasses_of(samplers.plans, "starts")
STEPS, GROUP = (
    12,
    48,
)  # of 12 steps, since SplitTree splits at step 9; 48 is a multiple of 16 (trees) and of 6 (branches)
NUMBERS = ("rollout", "train", "edges", "leaves")


def plan_of(name: str) -> Plan:
    return example(PLANS[name], EXAMPLES)


def drawn(plan: Plan, iteration: int = 0, group: int = GROUP, seed: int = 0) -> Tree:
    return plan.tree(STEPS, group, iteration, np.random.default_rng(seed))


def alike(one: Tree, other: Tree) -> bool:
    return all(torch.equal(vars(one)[name], vars(other)[name]) for name in COLUMNS)


def random_score(tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
    return torch.rand(len(nodes), generator=torch.Generator().manual_seed(int(nodes.sum())))


def cost_of(plan: Plan, tree: Tree) -> Cost:
    """What the tree costs; rolled out if the plan drops states on the way."""
    select = plan.select(random_score)
    if select is None:
        return tree.cost()
    noise = KeyedNoise(0, 0, [0], (1,))
    forest = rollout(lambda x, s, r: -x, noise.start(tree), plain_sigmas(STEPS), tree, ODE(), noise.step, select=select)
    return replace(forest.tree.cost(), rollout=forest.evaluations)


def check_forecast(plan: Plan) -> None:
    """No iteration costs more in any number than the forecast."""
    forecast = plan.forecast(STEPS, GROUP)
    for iteration in range(20):
        cost = cost_of(plan, drawn(plan, iteration, seed=iteration))
        assert all(vars(cost)[name] <= vars(forecast)[name] for name in NUMBERS), (iteration, cost, forecast)


def check_determinism(plan: Plan) -> None:
    """A function of the iteration and of what rng draws; no memory of earlier calls."""
    for iteration, seed in ((0, 0), (7, 0), (7, 3)):
        first = drawn(plan, iteration, seed=seed)
        drawn(plan, iteration + 1, seed=seed + 1)
        assert alike(first, drawn(plan, iteration, seed=seed))


def check_group(plan: Plan) -> None:
    """Roots divide the group; twice the group has twice the samples, from as many roots or twice as many."""
    for iteration in range(4):
        one, two = drawn(plan, iteration), drawn(plan, iteration, 2 * GROUP)
        assert GROUP % one.num_roots == 0 and two.num_roots in (one.num_roots, 2 * one.num_roots)
        samples, more = int(sampled(one).sum()), int(sampled(two).sum())
        assert samples % GROUP == 0 and samples > 0 and more == 2 * samples


# ---------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_all_members(name: str) -> None:
    assert not differences(PLANS[name], Plan)


@pytest.mark.parametrize("name", PLANS)
def test_every_tree_is_sound(name: str) -> None:
    for iteration in range(20):
        tree = drawn(plan_of(name), iteration, seed=iteration)
        check_columns({column: vars(tree)[column] for column in COLUMNS}, STEPS)
        assert tree.num_steps == STEPS and tree.num_groups == 1 and bool(len(tree.edges)) == (name not in WITHOUT_EDGES)
        assert not bool(tree.index[: tree.num_roots].any()) and int(tree.source.max()) < len(SOURCES)
        assert bool((tree.index[tree.edges] < STEPS).all()), "the last step is trained by default"
        ends = torch.ones(len(tree), dtype=torch.bool)
        ends[tree.evaluated] = False
        assert torch.equal(ends.nonzero().flatten(), tree.leaves), "a state without children is not decoded"
        deterministic = torch.stack([tree.parent, tree.index])[:, (tree.level == 0) & (tree.parent >= 0)]
        assert len(deterministic.unique(dim=1)[0]) == deterministic.shape[1], "two equal deterministic children"


@pytest.mark.parametrize("name", PLANS)
def test_every_forecast_bounds_twenty_iterations(name: str) -> None:
    check_forecast(plan_of(name))


@pytest.mark.parametrize("name", PLANS)
def test_every_tree_is_a_function_of_its_arguments(name: str) -> None:
    check_determinism(plan_of(name))


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_group_it_is_asked_for(name: str) -> None:
    check_group(plan_of(name))


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_refuses_what_cannot_be(name: str) -> None:
    for steps, group in ((0, GROUP), (STEPS, 0)):
        with pytest.raises(ValueError, match="expected"):
            plan_of(name).tree(steps, group, 0, np.random.default_rng(0))


def described(value: Any) -> Any:
    """A dataclass as the class_path and init_args of a configuration."""
    if is_dataclass(value):
        kind = type(value)
        arguments = {entry.name: described(vars(value)[entry.name]) for entry in fields(value)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_can_be_written_in_yaml(name: str) -> None:
    plan, parser = plan_of(name), ArgumentParser(exit_on_error=False)
    parser.add_argument("--plan", type=Plan)
    written = yaml.safe_load(yaml.safe_dump({"plan": described(plan)}))
    assert parser.instantiate_classes(parser.parse_object(written)).plan == plan


# ---------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_stays_inside_its_bounds(name: str) -> None:
    position = example(POSITIONS[name], {"Fixed": {"at": 2}})
    assert not differences(POSITIONS[name], Position)
    for low, high, size in ((0, 11, 4), (2, 9, 3), (1, 4, 2)):
        possible = list(position.starts(low, high, size))
        assert possible and low <= min(possible) and max(possible) <= high - size
        for iteration in range(200):
            start = position.start(iteration, low, high, size, np.random.default_rng(iteration))
            assert start in possible
            assert start == position.start(iteration, low, high, size, np.random.default_rng(iteration))


# ---------------------------------------------------------------------------------------------- the checks themselves


def test_all_public_plans_and_positions_are_found() -> None:
    public = {name for name in samplers.plans.__all__ if isinstance(vars(samplers.plans)[name], type)}
    assert public - {"Bounded", "Plan", "Position"} == {*PLANS, *POSITIONS} and set(EXAMPLES) <= set(PLANS)


@dataclass(frozen=True)
class Optimistic(Chain):
    """Forecasts one row less than it costs."""

    def forecast(self, num_steps: int, group_size: int) -> Cost:
        cost = Chain().forecast(num_steps, group_size)
        return replace(cost, rollout=cost.rollout - 1)


@dataclass(frozen=True)
class Unseeded(Chain):
    """Draws from a generator of its own."""

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        return Window().tree(num_steps, group_size, iteration, np.random.default_rng(RUNNING.integers(2**32)))


RUNNING = np.random.default_rng(0)


@dataclass(frozen=True)
class OneTooMany(Chain):
    """Adds a sample to every group."""

    def tree(self, num_steps: int, group_size: int, iteration: int, rng: np.random.Generator) -> Tree:
        return Chain().tree(num_steps, group_size + 1, iteration, rng)


@pytest.mark.parametrize(
    ("faulty", "check"),
    [(Optimistic(), check_forecast), (Unseeded(), check_determinism), (OneTooMany(), check_group)],
)
def test_a_fault_is_caught(faulty: Plan, check) -> None:
    with pytest.raises(AssertionError):
        check(faulty)
