"""The update engine: losses that couple a group, dealt to processes in micro-batches, have the gradient of one graph."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from flowalign.distributed.deal import Deal
from flowalign.distributed.processes import Processes
from flowalign.models.base import Size
from flowalign.models.conditions import Conditions
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import AdamWConfig, Measures, Part, States, TrainedRole, Update, UpdateEngine
from samplers import ODE, Chain
from tests.helpers.plain_rewards import fixed
from tests.helpers.roles import switch_role
from tests.helpers.thread_processes import on_processes

F64 = torch.float64
WIDTH, PROMPTS = 3, 4


@dataclass(eq=False)
class TwoNetworks:
    """A policy of one small fp64 network per role: "policy" and "critic". Guidance is not its business."""

    networks: dict[str, nn.Module]
    active: str = "policy"
    evaluations: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)

    @staticmethod
    def drawn(seed: int = 0) -> "TwoNetworks":
        generator, networks = torch.Generator().manual_seed(seed), {}
        for role in ("policy", "critic"):
            network = nn.Sequential(nn.Linear(WIDTH + 2, 5), nn.Tanh(), nn.Linear(5, WIDTH)).double()
            for parameter in network.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=F64)
            networks[role] = network
        return TwoNetworks(networks)

    def velocity(
        self, x: Tensor, sigma: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0,
        detach_uncond: bool = False,
    ) -> Tensor:  # fmt: skip
        self.evaluations += len(x)
        self.calls.append((self.active, len(x)))
        return self.networks[self.active](torch.cat([x, sigma[:, None], conditions.tensors["word"]], 1))

    role = switch_role

    def parameters_of(self, role: str) -> list[tuple[str, nn.Parameter]]:
        return [(f"{role}.{name}", parameter) for name, parameter in self.networks[role].named_parameters()]


def engine_of(policy: Any, processes: Processes | None = None, micro_batch: int = 64, images: int = 1) -> UpdateEngine:
    words = Conditions({"word": torch.linspace(-1, 1, PROMPTS, dtype=F64)[:, None]})
    rollout = Rollout(Chain(), ODE(), micro_batch=micro_batch)
    task = Task(policy, fixed([0.0]), rollout, 0, Size(8, 8), processes or Processes())
    return UpdateEngine(task, words, images)


def dealt(processes: Processes, count: int) -> Deal:
    """State n lies on process n mod their number."""
    return processes.deal(torch.arange(count) % processes.count)


def states_of(count: int) -> States:
    generator = torch.Generator().manual_seed(1)
    x, sigma = (torch.rand(shape, generator=generator, dtype=F64) for shape in ((count, WIDTH), (count,)))
    return States(x, sigma, torch.arange(count) % PROMPTS)


# ---------------------------------------------------------------------------------------------- losses of a group


def preference(errors: Tensor) -> Tensor:
    """Pairs, as Diffusion-DPO has them (2311.12908, eq. 14 without a reference): 2i is better than 2i+1."""
    return -logsigmoid(-3.0 * (errors[0::2] - errors[1::2])).mean()


def contrast(errors: Tensor) -> Tensor:
    """Every state against all others."""
    return (errors.mean() + torch.logsumexp(-errors, 0)).square()


TARGETS = torch.linspace(-1, 1, 14 * WIDTH, dtype=F64).reshape(14, WIDTH)
LOSSES = {"policy": preference, "critic": contrast}


def errors_of(engine: UpdateEngine, states: States, role: str) -> Callable[[Part], Tensor]:
    """part -> [n]: the errors of the policy to TARGETS, or of the critic to what the policy is now."""
    targets = TARGETS if role == "policy" else engine.frozen(states, "policy")[0].values
    return lambda part: (engine.velocity(states.at(part.index), role) - targets[part.index]).square().mean(1)


def take(engine: UpdateEngine, update: Update) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of the step over all processes, and its metrics; the weights are stepped. As in `run.Run`."""
    policy, processes = engine.task.policy, engine.task.processes
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    found = {}
    for name, parameter in chain(policy.parameters_of("policy"), policy.parameters_of("critic")):
        assert (parameter.grad is not None) == name.startswith(update.role)
        if parameter.grad is not None:
            parameter.grad = processes.gather(parameter.grad[None]).sum(0)
            found[name] = parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_([p for _, p in policy.parameters_of(update.role)], update.max_grad_norm)
    update.optimizer.step()
    update.optimizer.zero_grad(set_to_none=True)
    return found, update.after()


Steps = list[tuple[dict[str, Tensor], dict[str, float]]]


def in_parts(policy: TwoNetworks, count: int, size: int, processes: Processes) -> Steps:
    """Two steps of each role in turn."""
    engine, states = engine_of(policy, processes, micro_batch=size, images=count), states_of(count)
    trained = [TrainedRole.of(policy, AdamWConfig(lr=0.1, max_grad_norm=0.5), role) for role in LOSSES]
    steps = []
    for one in (*trained, *trained):
        value = errors_of(engine, states, one.role)
        steps.append(take(engine, engine.coupled_update(one, dealt(processes, count), size, value, LOSSES[one.role])))
    return steps


def in_one_graph(policy: TwoNetworks, count: int) -> Steps:
    """The same, of one graph over all states."""
    engine, states = engine_of(policy), states_of(count)
    whole = Part(0, torch.arange(count), count)
    optimizers = {role: torch.optim.AdamW([p for _, p in policy.parameters_of(role)], lr=0.1, weight_decay=1e-4)
                  for role in LOSSES}  # fmt: skip
    steps = []
    for role in (*LOSSES, *LOSSES):
        loss = LOSSES[role](errors_of(engine, states, role)(whole))
        update = Update(optimizers[role], 0.5, [lambda loss=loss: loss], dict, role)
        steps.append((take(engine, update)[0], {f"loss/{role}": float(loss.detach())}))
    return steps


def check_equal(steps: Steps, expected: Steps) -> None:
    assert len(steps) == len(expected) == 4
    for (found, metrics), (reference, loss) in zip(steps, expected, strict=True):
        assert found.keys() == reference.keys() and len(found) == 4
        assert all(bool(gradient.any()) for gradient in reference.values())
        for name, gradient in reference.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12 * float(gradient.abs().max()))
        for name, value in loss.items():
            assert metrics[name] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_a_coupled_loss_in_micro_batches_has_the_gradient_of_one_graph(size: int) -> None:
    """14 states; pairs and groups lie across micro-batches. After each step of one role the other sees its new weights."""
    policy = TwoNetworks.drawn()
    check_equal(in_parts(policy, 14, size, Processes()), in_one_graph(TwoNetworks.drawn(), 14))
    assert max(rows for _, rows in policy.calls) == min(size, 14)  # the memory is that of a micro-batch


@pytest.mark.parametrize(
    ("ranks", "size", "padding"), [(2, 3, 0), (3, 2, 1), (4, 1, 2), (16, 3, 2)], ids=lambda value: str(value)
)
def test_the_shares_of_several_processes_add_up_to_it(
    monkeypatch: pytest.MonkeyPatch, ranks: int, size: int, padding: int
) -> None:
    """Padding weighs nothing, also on a process that has nothing else; all call the networks equally often."""
    policies = [TwoNetworks.drawn() for _ in range(ranks)]
    everyone = [Processes(rank, ranks) for rank in range(ranks)]
    parts = [engine_of(policies[0], each).micro_batches(dealt(each, 14), size) for each in everyone]
    assert sum(len(part.index) - part.real for own in parts for part in own) == padding
    results = on_processes(
        ranks, lambda processes: in_parts(policies[processes.rank], 14, size, processes), monkeypatch
    )
    expected = in_one_graph(TwoNetworks.drawn(), 14)
    for rank, steps in enumerate(results):
        check_equal(steps, expected)
        assert [metrics["cost/trained_per_image"] for _, metrics in steps] == [
            metrics["cost/trained_per_image"] for _, metrics in results[0]
        ]
        own, first = (
            [call for call in policy.calls if call[0] == "critic"] for policy in (policies[rank], policies[0])
        )
        assert own == first and len(own) > 0


OWNER = torch.tensor([0, 0, 2, 1, 5, 5, 5, 3, 6, 4, 2])  # the state of each of eleven numbers, of seven states


def several(engine: UpdateEngine, states: States) -> Callable[[Part], Tensor]:
    """part -> [e]: of each number the error of its state to another target."""

    def value(part: Part) -> Tensor:
        place = part.place(OWNER)
        velocity = engine.velocity(states.at(part.index))[place[place >= 0]]
        return (velocity - TARGETS[: len(OWNER)][place >= 0]).square().mean(1)

    return value


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_state_may_have_several_numbers(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Micro-batches of two states; each state is evaluated once in each pass, and once less where its numbers are known."""

    def work(processes: Processes) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, float]]:
        policy, states = TwoNetworks.drawn(), states_of(7)
        engine = engine_of(policy, processes, images=7)
        value, trained = several(engine, states), TrainedRole.of(policy, AdamWConfig(lr=1e-12))
        told: list[Tensor] = []

        def metrics(numbers: Tensor) -> dict[str, float]:
            told.append(numbers)
            return {"mine/sum": float(numbers.sum())}

        first, measured = take(
            engine,
            engine.coupled_update(trained, dealt(processes, 7), 2, value, contrast, owner=OWNER, metrics=metrics),
        )
        again, known = take(
            engine, engine.coupled_update(trained, dealt(processes, 7), 2, value, contrast, owner=OWNER, known=told[0])
        )
        assert known["cost/frozen_per_image"] == 0 and known["loss/policy"] == measured["loss/policy"]
        return first, again, told[0], measured

    policy = TwoNetworks.drawn()
    engine = engine_of(policy)
    numbers = several(engine, states_of(7))(Part(0, torch.arange(7), 7))
    contrast(numbers).backward()
    for first, again, told, measured in on_processes(ranks, work, monkeypatch):
        torch.testing.assert_close(told, numbers.detach(), rtol=1e-12, atol=0)
        assert measured["mine/sum"] == pytest.approx(float(numbers.detach().sum()), rel=1e-12)
        assert 1 <= measured["cost/frozen_per_image"] < 1 + ranks / 7  # padding is evaluated too
        for name, parameter in policy.parameters_of("policy"):
            assert parameter.grad is not None
            torch.testing.assert_close(first[name], parameter.grad, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(again[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_states_without_an_adjoint_are_left_out_of_the_second_pass() -> None:
    """By a weight of 0, or by the loss; of the others the terms are weighed. With none left there is no step, but a loss."""
    policy, states = TwoNetworks.drawn(), states_of(7)
    engine, trained = engine_of(policy, images=7), TrainedRole.of(policy, AdamWConfig())
    value = several(engine, states)
    weight = torch.where(torch.isin(OWNER, torch.tensor([0, 5])), 3.0, 0.0).double()

    def gradient(loss: Callable[[Tensor], Tensor], weight: Tensor | None = None) -> tuple[list[Tensor], int]:
        update = engine.coupled_update(trained, dealt(Processes(), 7), 4, value, loss, owner=OWNER, weight=weight)
        before = policy.evaluations
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        grads = [p.grad.clone() for _, p in policy.parameters_of("policy") if p.grad is not None]
        policy.networks["policy"].zero_grad()
        assert update.after()["loss/policy"] == float(loss(torch.zeros(11, dtype=F64)) if not grads else loss(numbers))
        return grads, policy.evaluations - before

    with torch.no_grad():
        numbers = value(Part(0, torch.arange(7), 7))
    chosen, rows = gradient(contrast, weight)
    assert rows == 2
    adjoint = torch.autograd.functional.jacobian(contrast, numbers) * weight
    (adjoint * value(Part(0, torch.arange(7), 7))).sum().backward()
    for found, (_, parameter) in zip(chosen, policy.parameters_of("policy"), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-14)
    policy.networks["policy"].zero_grad()
    _, rows = gradient(lambda numbers: numbers[2:4].sum())
    assert rows == 2
    before = trained.updates
    assert gradient(lambda numbers: 0.0 * numbers.sum()) == ([], 0) and trained.updates == before


def test_an_odd_group_is_padded_and_the_padding_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 states on 2 processes: the second repeats state 0, whose number there is replaced by one without meaning."""

    def work(processes: Processes) -> dict[str, Tensor]:
        policy, states = TwoNetworks.drawn(), states_of(7)
        engine = engine_of(policy, processes)
        errors = errors_of(engine, states, "policy")

        def value(part: Part) -> Tensor:
            values = errors(part)
            padding = torch.arange(len(values)) >= part.real
            assert not padding.any() or (processes.rank, part.number, part.real) == (1, 1, 1)
            return torch.where(padding, 1e3 * values, values)

        trained = TrainedRole.of(policy, AdamWConfig())
        return take(engine, engine.coupled_update(trained, dealt(processes, 7), 2, value, contrast))[0]

    policy = TwoNetworks.drawn()
    engine, whole = engine_of(policy), Part(0, torch.arange(7), 7)
    contrast(errors_of(engine, states_of(7), "policy")(whole)).backward()
    first, second = on_processes(2, work, monkeypatch)
    for name, parameter in policy.parameters_of("policy"):
        assert parameter.grad is not None
        torch.testing.assert_close(first[name], parameter.grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(first[name], second[name])


# ---------------------------------------------------------------------------------------------- dealing


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_micro_batches_hold_each_state_once_and_are_alike_on_all_processes(ranks: int, count: int, size: int) -> None:
    everyone = [Processes(rank, ranks) for rank in range(ranks)]
    all_parts = [engine_of(TwoNetworks.drawn(), each).micro_batches(dealt(each, count), size) for each in everyone]
    own = [state for parts in all_parts for part in parts for state in part.index[: part.real].tolist()]
    assert sorted(own) == list(range(count))
    assert len({tuple(len(part.index) for part in parts) for parts in all_parts}) == 1
    for part in chain.from_iterable(all_parts):
        assert 0 < len(part.index) <= size
        assert all(0 <= state < count for state in part.index.tolist())  # padding repeats a state that exists


def test_a_part_knows_where_its_own_states_lie() -> None:
    part = Part(0, torch.tensor([5, 2, 0]), real=2)  # 0 is padding: another process's state
    assert part.place(torch.tensor([0, 2, 2, 5, 9])).tolist() == [-1, 1, 1, 0, -1]
    assert part.place(torch.tensor([], dtype=torch.long)).tolist() == []


# ---------------------------------------------------------------------------------------------- without a graph


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_frozen_evaluates_each_state_once_under_its_own_role(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """11 states on their own roles; with three processes one has no state of the critic."""
    states, images = states_of(11), 4
    roles = ["critic" if state in (0, 1, 9) else "policy" for state in range(11)]
    policies = [TwoNetworks.drawn() for _ in range(ranks)]

    def work(processes: Processes) -> tuple[Tensor, float]:
        engine, mine = (
            engine_of(policies[processes.rank], processes, micro_batch=3, images=images),
            dealt(processes, 11).mine,
        )
        found, cost = engine.frozen(states, roles, mine=mine)
        assert len(found.values) == len(mine)  # those of the others stay with them
        return processes.gather(found.at(mine))[processes.gather(mine).argsort()], cost

    results = on_processes(ranks, work, monkeypatch)
    calls = [call for policy in policies for call in policy.calls]
    assert {role: sum(rows for name, rows in calls if name == role) for role in LOSSES} == {"policy": 8, "critic": 3}
    assert max(rows for _, rows in calls) == 3
    engine = engine_of(TwoNetworks.drawn())
    each = {role: engine.frozen(states, role)[0].values for role in LOSSES}
    expected = torch.stack([each[role][state] for state, role in enumerate(roles)])
    for values, cost in results:
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=1e-14)
        assert not values.requires_grad and cost == 11 / images
    assert bool((each["policy"] - each["critic"]).abs().min() > 1e-3)  # the roles differ
    assert {policy.active for policy in policies} == {"policy"}


def test_frozen_refuses_roles_of_another_number() -> None:
    with pytest.raises(ValueError, match="got 2 roles for 3 states"):
        engine_of(TwoNetworks.drawn()).frozen(states_of(3), ["policy", "critic"])


# ---------------------------------------------------------------------------------------------- steps


def regression(errors: Callable[[Part], Tensor], count: int, part: Part, measures: Measures) -> Tensor:
    own = errors(part)[: part.real]
    measures.add(error=own, loss=own.sum())
    return own.sum() / count


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_learning_rate_follows_the_steps_of_its_role_and_no_step_is_counted_without_parts(role: str) -> None:
    policy, states = TwoNetworks.drawn(), states_of(5)
    engine = engine_of(policy, images=2)
    config = AdamWConfig(lr=0.1, warmup=3)
    trained, other = (TrainedRole.of(policy, config, name) for name in (role, *(LOSSES.keys() - {role})))
    key = "optim/lr" if role == "policy" else "optim/critic_lr"
    parts, rates = engine.micro_batches(dealt(Processes(), 5), 2), []
    for wanted in (parts, [], parts, [], [], parts, parts, parts):
        before, weights = trained.updates, deepcopy(policy.networks[role].state_dict())
        asked: list[Measures] = []

        def metrics(measures: Measures, asked: list[Measures] = asked) -> dict[str, float]:
            asked.append(measures)
            return {"mine/error": measures.total("loss")}

        update = engine.update(trained, wanted, partial(regression, errors_of(engine, states, role), 5), metrics)
        assert (update.role, update.optimizer, update.max_grad_norm) == (role, trained.optimizer, 1.0)
        if not wanted:
            assert len(update.micro_batches) == 0
            measured = update.after()  # in place of a step
            assert set(measured) == {"time/update", "cost/trained_per_image", key} and not asked
            assert trained.updates == before and measured["cost/trained_per_image"] == 0
            continue
        _, measured = take(engine, update)
        assert trained.updates == before + 1 and len(asked) == 1
        assert asked[0].rows("error").shape == (5,)
        assert measured["mine/error"] == pytest.approx(float(asked[0].rows("error").sum()), rel=1e-12)
        assert measured["cost/trained_per_image"] == 5 / 2
        assert trained.optimizer.param_groups[0]["lr"] == measured[key]
        rates.append(measured[key])
        assert any(not torch.equal(weights[name], value) for name, value in policy.networks[role].state_dict().items())
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-12)
    assert other.updates == 0 and not other.optimizer.state


def test_a_resumed_role_goes_on_where_its_schedule_was() -> None:
    policy = TwoNetworks.drawn()
    trained = TrainedRole.of(policy, AdamWConfig(lr=0.1, warmup=3), "critic", updates=1)
    engine, states = engine_of(policy), states_of(3)
    loss = partial(regression, errors_of(engine, states, "critic"), 3)
    update = engine.update(trained, engine.micro_batches(dealt(Processes(), 3), 3), loss)
    assert take(engine, update)[1]["optim/critic_lr"] == pytest.approx(0.05) and trained.updates == 2


def test_the_numbers_of_the_states_are_in_their_order_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(processes: Processes) -> Tensor:
        engine = engine_of(TwoNetworks.drawn(), processes)
        parts = engine.micro_batches(dealt(processes, 5), 2)
        return engine.scalars(dealt(processes, 5), parts, lambda part: part.index.float().requires_grad_() * 10 + 1)

    for values in on_processes(2, work, monkeypatch):
        assert values.tolist() == [1, 11, 21, 31, 41] and values.dtype == F64 and not values.requires_grad


def test_the_learning_rate_halves_with_every_half_life() -> None:
    config = AdamWConfig(lr=0.1, half_life=4)
    assert [config.lr_at(update) for update in (0, 4, 8)] == pytest.approx([0.1, 0.05, 0.025])
    assert config.lr_at(2) == pytest.approx(0.1 / 2**0.5)
    with pytest.raises(ValueError, match="half_life=0; expected updates"):
        AdamWConfig(half_life=0)
