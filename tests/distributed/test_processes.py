"""Two processes do what one does: the same noise, the same batch, the same gradient, and no process waits for ever."""

from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flowalign.distributed import processes as distributed
from flowalign.distributed.processes import Processes
from tests.helpers.forks import Forks
from tests.helpers.one_iteration import PLANS
from tests.helpers.thread_processes import on_processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_shares_and_deals_cover_everything_once(count: int, n: int) -> None:
    everyone = [Processes(rank, count) for rank in range(count)]
    assert [i for each in everyone for i in each.share(n)] == list(range(n))
    for owner in (torch.arange(n) % count, torch.zeros(n, dtype=torch.int64), (torch.arange(n) ** 2) % count):
        deals = [each.deal(owner) for each in everyone]
        assert sorted(i for deal in deals for i in deal.mine.tolist()) == list(range(n))
        assert {len(deal.mine) for deal in deals} <= {n // count, -(-n // count)}
        assert {len(deal.padded[deal.rank]) for deal in deals} == {-(-n // count)}  # every process runs as many
        for rank, deal in enumerate(deals):
            assert deal.mine.tolist() == sorted(deal.mine.tolist())  # as numbers of states are put together
            held = int((owner == rank).sum())
            assert int((owner[deal.mine] == rank).sum()) >= min(held, n // count)  # what it has stays


def test_a_process_left_without_items_repeats_one_that_it_was_sent() -> None:
    """A second pass over some of the items: all run as many, and none asks for an item that lies elsewhere only."""
    deals = [Processes(rank, 3).deal(torch.arange(7) % 3) for rank in range(3)]
    for items in ([0, 3], [4], [], [1, 2, 5], list(range(7))):
        some = [deal.only(torch.tensor(items, dtype=torch.int64)) for deal in deals]
        assert sorted(i for deal in some for i in deal.mine.tolist()) == items
        assert len({len(deal.padded[deal.rank]) for deal in some}) == 1
        for deal, whole in zip(some, deals, strict=True):
            assert set(deal.padded[deal.rank].tolist()) <= set(whole.padded[whole.rank].tolist())


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_equal_trees_stay_where_they_are_whatever_an_update_takes(updates: int) -> None:
    """Eight groups of six states on two processes; an update takes a run of the groups, as trainers do."""
    group = torch.arange(8).repeat(6)
    everyone = [Processes(rank, 2) for rank in range(2)]
    assert sorted(number for each in everyone for number in each.groups(8)) == list(range(8))
    for update in range(updates):
        own = group[group // (8 // updates) == update]
        for each in everyone:
            owner = each.owners(own)
            assert bool((owner[each.deal(owner).mine] == each.rank).all())
            assert set(own[owner == each.rank].tolist()) <= set(each.groups(8))


def test_gradients_are_summed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In messages of at most 64 bytes, or of one tensor; of several dtypes; of a parameter that one process reached, and of one that
    none did. Bit for bit the sum of the two."""
    shapes = [(3, 2), (2,), (40,), (3,), (1,), (5,)]
    grads = {
        rank: [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for shape in shapes] for rank in (0, 1)
    }
    monkeypatch.setattr(distributed, "BUCKET", 64)
    messages: list[int] = []

    def work(processes: Processes) -> list[torch.Tensor | None]:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters[3].data = parameters[3].data.double()
        for parameter, grad in zip(parameters[:-1], grads[processes.rank], strict=False):
            parameter.grad = grad.to(parameter.dtype, copy=True)
        if processes.rank == 0:
            parameters[4].grad = None
        places = [None if p.grad is None else p.grad.data_ptr() for p in parameters]
        reduce = distributed.all_reduce
        if processes.rank == 0:
            monkeypatch.setattr(distributed, "all_reduce", lambda sent: messages.append(sent.nbytes) or reduce(sent))
        processes.wait()
        processes.sum_gradients(parameters)
        assert all(
            place in (None, p.grad.data_ptr())
            for place, p in zip(places, parameters, strict=True)
            if p.grad is not None
        )
        return [p.grad for p in parameters]

    for *found, one_alone, nobody in on_processes(2, work, monkeypatch):
        for grad, first, second in zip(found, grads[0], grads[1], strict=False):
            assert torch.equal(grad, first.to(grad.dtype) + second.to(grad.dtype))
        assert torch.equal(one_alone, grads[1][4]) and nobody is None
    assert messages[::2] == [32, 160, 24, 4]


Results = list[tuple[dict[str, torch.Tensor], dict[str, str]]]


def launch(count: int, pipeline: Path, output: Path, forks: Forks, plan: str, weights: str = "replicated") -> Results:
    output.mkdir()
    forks.check("-m", "tests.helpers.one_iteration", str(pipeline), str(output), plan, weights, count=count)
    results = []
    for rank in range(count):
        with safe_open(str(output / f"{rank}.safetensors"), framework="pt") as file:
            results.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata()))  # noqa: SIM118
    return results


@pytest.fixture(scope="module")
def alone(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> dict[str, Results]:
    """By plan, what one process does."""
    return {plan: launch(1, tiny_pipeline, tmp_path_factory.mktemp("alone") / plan, forks, plan) for plan in PLANS}


# of a node: group and number, kept, log-prob, state scores, whether a role is known; each guided state's two metrics
PER_NODE = {"window": 16 + 1 + 4 + 4, "selected": 16 + 1 + 4 + 4 + 4 + 8 + 1 + 1 + 2 * 4}
PER_LEAF = 4 + 1 + 4 + 4  # score, valid, uncertainty, a component
PER_STEP = 7 * 8  # drift, ratio, clipping, norm, and numbers of steps
FIXED = 1024  # sizes of messages, totals, names


def check_messages(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], plan: str) -> None:
    """The bytes that each process hands to the collective calls, against those of scores, log-probs, topology and surplus states."""

    def share(group: torch.Tensor) -> int:
        """Of the process that has more: the others pad."""
        return max(int((group % 2 == 0).sum()), int((group % 2).sum()))

    state, (edges, left, group) = first["leaves"][0].nbytes, first["trained"]
    scores = PER_NODE[plan] * share(first["group"]) + PER_LEAF * share(first["group_of_leaf"])
    for own in (first, second):
        collected, updated, _, reduced = own["messages"].tolist()
        assert 0.9 * scores < collected < scores + FIXED
        assert updated < PER_STEP * len(edges) + FIXED
        assert collected + updated < 0.01 * int(own["held"][1]) * state  # of what all states would be
        assert reduced == sum(own[name].nbytes for name in own if "lora" in name)
    assert second["messages"][2] == 0  # the first process has more than its share of what teaches, and sends the rest
    own = left[group % 2 == 0].unique()
    surplus = own[-(-len(left.unique()) // 2) :]
    arrived = edges[torch.isin(left, surplus)]
    others = {"window": 0, "selected": 2}[plan]  # the rollout's velocities and the gradients that guided it
    sent = len(torch.cat([surplus, arrived]).unique()) + others * len(surplus)
    prompts = len(group[torch.isin(left, surplus)].unique())
    assert len(surplus) > 0 and first["messages"][2] <= sent * state + prompts * first["condition"]
    assert first["messages"][2] >= (len(surplus) + 1) * state


@pytest.mark.parametrize(
    ("plan", "states", "padded", "weights"),
    [  # nine states: one process runs one more, with weight 0
        ("window", 9, 10, "replicated"),
        ("selected", 24, 24, "replicated"),
        ("window", 9, 10, "sharded"),
        pytest.param("window", 9, 10, "checkpointed", marks=pytest.mark.slow),  # and sharded
    ],
)
def test_two_processes_equal_one(
    alone: dict[str, Results],
    tiny_pipeline: Path,
    tmp_path: Path,
    forks: Forks,
    plan: str,
    states: int,
    padded: int,
    weights: str,
) -> None:
    """Unequal trees, a process whose groups teach nothing, best of n, a masked reward, a prompt that comes twice."""
    [(one, metrics)] = alone[plan]
    (first, first_metrics), (second, second_metrics) = launch(2, tiny_pipeline, tmp_path / "two", forks, plan, weights)
    assert first["rows"][0] != second["rows"][0]  # the trees are unequal …
    assert first["rows"][0] + second["rows"][0] == one["rows"][0]  # … and each state is evaluated by one process
    assert first["rows"][1] == second["rows"][1]
    held, kept = first["held"][0] + second["held"][0], first["held"][1]
    assert held == kept == one["held"][0] and 0 < first["held"][0] < kept  # each process has the states it rolled out
    assert not one["valid"].all() and one["valid"].sum() > 0 and one["state_scores"].isfinite().sum() > 10
    assert first_metrics == second_metrics
    assert first_metrics.keys() == metrics.keys()
    for name in ("group/trained_edges", "group/zero_std_ratio", "reward/invalid", "cost/rollout_per_image"):
        assert first_metrics[name] == metrics[name]
    assert literal_eval(metrics["cost/trained_per_image"]) == states / 20
    assert literal_eval(first_metrics["cost/trained_per_image"]) == padded / 20
    for name in metrics.keys() - {"cost/trained_per_image", "ratio/drift_max"}:
        assert literal_eval(first_metrics[name]) == pytest.approx(literal_eval(metrics[name]), rel=1e-4, abs=1e-7)
    trained = [name for name in one if "lora" in name]
    assert trained
    for own in (first, second):
        torch.testing.assert_close(own["roots"], one["roots"], rtol=0, atol=0)
        for name in ("leaves", "scores", "state_scores", "uncertainty"):
            torch.testing.assert_close(own[name], one[name], rtol=0, atol=1e-5, equal_nan=True)
        for name in trained:
            assert (own[name] - one[name]).norm() <= 1e-5 * one[name].norm()
            assert one[name].norm() > 0
    check_messages(first, second, plan)
    for name in first:
        if name not in ("rows", "held", "messages"):
            torch.testing.assert_close(
                first[name], second[name], rtol=0, atol=0, equal_nan=True
            )  # one batch, one gradient
