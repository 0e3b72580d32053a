"""A chunk decoded and scored in a thread while the next one is rolled out: the same results, one at a time, and no thread left."""

import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.rollouts import judging
from flowalign.rollouts.collect import ScoredRollout, collect
from flowalign.rollouts.task import Task
from rewards import GroupDiversity, RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import Branch, Chain, Forest, Selected, rollout
from tests.helpers.emulated_device import DEVICE, EmulatedDevice
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.policy_gradient import PROMPTS, make

FOUR = [PROMPTS[0], PROMPTS[1], PROMPTS[0], replace(PROMPTS[1], uid=7)]  # one prompt twice


def task_of(pipeline: Path, reward, plan=None, load=None, **settings: Any) -> Task:
    """In chunks of one group, whose three images are two parts."""
    task = make(pipeline, plan or Chain(), reward=reward, load=load)[1].task
    return replace(task, rollout=replace(task.rollout, **{"chunk": 1, "micro_batch": 2, "overlap": True, **settings}))


def assert_same(found: ScoredRollout, expected: ScoredRollout) -> None:
    """Bit for bit; of the metrics all but times."""
    for name in ("scores", "valid"):
        torch.testing.assert_close(vars(found)[name], vars(expected)[name], rtol=0, atol=0, equal_nan=True)
    for name in ("states", "row", "log_prob", "evaluations"):
        torch.testing.assert_close(
            vars(found.forest)[name], vars(expected.forest)[name], rtol=0, atol=0, equal_nan=True
        )
    for name in ("parent", "group", "local", "index", "level"):
        assert torch.equal(vars(found.forest.tree)[name], vars(expected.forest.tree)[name])
    metrics, known = (
        {name: value for name, value in batch.metrics.items() if not name.startswith("time/")}
        for batch in (found, expected)
    )
    assert metrics == pytest.approx(known, rel=0, abs=0, nan_ok=True)


class Lacking:
    """Brightness, but none of the second group the first time; draws random numbers, which are not the run's."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        torch.rand(3)
        output, second = brightness(batch), torch.tensor(batch.group_ids) == 1
        self.asked += bool(second.any())
        output.valid[second] = self.asked > 2  # of two parts
        return output


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "chain": (lambda: Plain(brightness), {}),
    "tree": (lambda: Plain(brightness), {"plan": Branch(3)}),
    "chunks of three": (lambda: Plain(brightness), {"chunk": 3}),
    "offloaded": (lambda: Plain(brightness), {"load": {"offload": ["vae", "encoders"]}}),
    "groupwise": (GroupDiversity, {}),
    "refilled": (lambda: Plain(Lacking()), {"refill": 2}),
}


@pytest.mark.parametrize(("reward", "settings"), CASES.values(), ids=CASES)
def test_overlap_changes_nothing_but_times(tiny_pipeline: Path, reward, settings: dict[str, Any]) -> None:
    serial, beside = (task_of(tiny_pipeline, reward(), overlap=overlap, **settings) for overlap in (False, True))
    before = torch.get_rng_state()
    found, expected = collect(beside, FOUR, 0), collect(serial, FOUR, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(found, expected)
    assert found.metrics.get("cost/refilled_groups") == (1 if "refill" in settings else None)
    own, other = beside.counts, serial.counts
    assert (own.decodes, own.reward_calls) == (other.decodes, other.reward_calls)
    assert "time/decode_hidden" in found.metrics and "time/decode_hidden" not in expected.metrics


def test_on_a_device_it_is_the_default_and_decodes_in_the_thread(tiny_pipeline: Path) -> None:
    """On an emulated one: what is beside waits no more often than what is not."""
    found = []
    with EmulatedDevice() as device:
        for overlap in (False, None):
            threads = set[threading.Thread]()

            def seen(batch: RewardBatch, threads: set[threading.Thread] = threads) -> RewardOutput:
                assert batch.images is not None and batch.images.device == DEVICE
                threads.add(threading.current_thread())
                return brightness(batch)

            task = task_of(tiny_pipeline, Plain(seen), load={"device": DEVICE}, overlap=overlap)
            with device.phase(str(overlap)):
                found.append(collect(task, FOUR, 0))
            assert len(threads) == 1 and (threading.main_thread() in threads) is (overlap is False)
    assert_same(found[1], found[0])
    serial, beside = ([(event.kind, event.waits) for event in device.seen(name)] for name in ("False", "None"))
    assert Counter(beside) == Counter(serial) and serial


class Held:
    """Brightness, held back until `going`. asked: the groups of each call."""

    def __init__(self) -> None:
        self.going, self.asked = threading.Event(), list[set[int]]()
        self.threads = set[threading.Thread]()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.asked.append(set(batch.group_ids))
        self.threads.add(threading.current_thread())
        assert self.going.wait(60), "the rollout waited for the reward"
        return brightness(batch)


def test_the_next_chunk_is_rolled_out_meanwhile_and_one_more_waits(tiny_pipeline: Path) -> None:
    """The first chunk is scored, the second waits, the third is rolled out; the fourth only once the second is scored."""
    held, rolled = Held(), 0
    fourth = threading.Event()

    def roll(*arguments: Any, **options: Any) -> Forest:
        nonlocal rolled
        rolled += 1
        if rolled == 3:  # serial, or with nothing that waits, the reward would hold the rollout back for ever
            threading.Timer(0.5, check).start()
        if rolled == 4:
            fourth.set()
        return rollout(*arguments, **options)

    def check() -> None:
        early.append(fourth.is_set())
        held.going.set()

    early = list[bool]()
    found = collect(task_of(tiny_pipeline, Plain(held)), FOUR, 0, roll=roll)
    assert early == [False] and fourth.is_set()
    assert len(held.threads) == 1 and threading.main_thread() not in held.threads
    assert held.asked == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]
    assert found.metrics["time/reward_hidden"] > 0 and found.metrics["time/reward"] > 0.1


def test_times_are_those_of_the_iteration_and_what_it_did_not_wait_for(tiny_pipeline: Path) -> None:
    """Eight parts sleep; what is waited for is no more than there was time beside the rollout."""

    def sleeping(batch: RewardBatch) -> RewardOutput:
        time.sleep(0.05)
        return brightness(batch)

    began = time.perf_counter()
    metrics = collect(task_of(tiny_pipeline, Plain(sleeping)), FOUR, 0).metrics
    wall = time.perf_counter() - began
    assert metrics["time/reward"] + metrics["time/reward_hidden"] > 0.4
    assert metrics["time/decode"] > 0 and metrics["time/decode_hidden"] > 0 and metrics["time/reward_hidden"] > 0
    assert metrics["time/rollout"] + metrics["time/decode"] + metrics["time/reward"] <= wall


def test_a_part_is_freed_before_the_next_is_decoded(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = list[weakref.ref[torch.Tensor]]()

    def seen(batch: RewardBatch) -> RewardOutput:
        assert batch.images is not None
        alive.append(weakref.ref(batch.images))
        reward.seen.clear()
        return brightness(batch)

    reward = Plain(seen)
    task = task_of(tiny_pipeline, reward)
    decode = task.policy.decode

    def counted(latents: torch.Tensor, grad: bool = False) -> torch.Tensor:
        assert not any(image() is not None for image in alive) and not torch.is_grad_enabled()
        return decode(latents, grad)

    monkeypatch.setattr(task.policy, "decode", counted)
    collect(task, FOUR, 0)
    assert len(alive) == 8


@pytest.mark.parametrize("where", ["decode", "reward"])
def test_an_error_of_the_thread_ends_the_run_with_its_own_traceback(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*arguments: object) -> Any:
        raise ArithmeticError("no picture")

    def roll(*arguments: Any, **options: Any) -> Forest:
        rolled.append(1)
        return rollout(*arguments, **options)

    rolled = list[int]()
    task = task_of(tiny_pipeline, Plain(broken if where == "reward" else brightness))
    if where == "decode":
        monkeypatch.setattr(task.policy, "decode", broken)
    with pytest.raises(RewardError if where == "reward" else ArithmeticError, match="no picture") as caught:
        collect(task, FOUR * 5, 0, roll=roll)
    error = caught.value.__cause__ or caught.value
    assert traceback.extract_tb(error.__traceback__)[-1].name == "broken"
    assert len(rolled) < 20 and not reward_threads()


def test_ctrl_c_leaves_no_thread(tiny_pipeline: Path) -> None:
    """What is being scored is, what waits is not."""
    held = Held()

    def roll(*arguments: Any, **options: Any) -> Forest:
        rolled.append(1)
        if len(rolled) == 3:
            threading.Timer(0.2, held.going.set).start()
            raise KeyboardInterrupt
        return rollout(*arguments, **options)

    rolled = list[int]()
    with pytest.raises(KeyboardInterrupt):
        collect(task_of(tiny_pipeline, Plain(held)), FOUR, 0, roll=roll)
    assert held.asked == [{0}] and not reward_threads()


@dataclass(frozen=True, eq=False)
class Stream:
    """A stream of CUDA that writes down what it is told."""

    name: str
    told: list[str]

    def wait_stream(self, other: "Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.told.append(f"host waits for {self.name}")


@pytest.mark.parametrize("breaks", [False, True])
def test_the_stream_of_the_thread_begins_after_the_rollout_and_is_waited_for(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    """With streams in place of CUDA's: before the chunk is decoded, before the reward is asked, which may have threads, and after."""
    told = list[str]()
    main, side = Stream("main", told), Stream("side", told)
    entered = list[threading.Thread]()

    def within(stream: Stream) -> AbstractContextManager[None]:
        assert stream is side
        entered.append(threading.current_thread())
        return nullcontext()

    def seen(batch: RewardBatch) -> RewardOutput:
        told.append("scored")
        if breaks:
            raise ArithmeticError
        return brightness(batch)

    monkeypatch.setattr(judging, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", within)
    task = task_of(tiny_pipeline, Plain(seen), micro_batch=3)
    with pytest.raises(RewardError) if breaks else nullcontext():
        collect(task, FOUR[:2], 0)
    assert (
        threading.main_thread() not in entered
        and told[0] == "side waits for main"
        and told[-1] == "main waits for side"
    )
    aside = [what for what in told[1:-1] if what != "side waits for main"]
    assert aside == ["host waits for side", "scored"] * (1 if breaks else 2)
    assert breaks or told.count("side waits for main") == 2


def reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reward ")]


SERIAL: dict[str, dict[str, Any]] = {
    "on a CPU": {"overlap": None},
    "one chunk": {"chunk": None},
    "a plan that selects": {"plan": Selected(Chain(), {2: 2})},
    "process rewards": {},
}


@pytest.mark.parametrize("case", SERIAL)
def test_without_other_work_or_beside_others_that_ask_nothing_overlaps(tiny_pipeline: Path, case: str) -> None:
    def seen(batch: RewardBatch) -> RewardOutput:
        assert threading.current_thread() is threading.main_thread()
        return brightness(batch)

    task = task_of(tiny_pipeline, Plain(seen), **SERIAL[case])
    if case == "process rewards":
        process = Plain(brightness, RewardSpec(scope="completion"))
        process.name = "state"
        task = replace(task, process_rewards=[process])
    assert "time/decode_hidden" not in collect(task, FOUR, 0).metrics
