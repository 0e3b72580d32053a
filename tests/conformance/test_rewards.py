"""Every reward in rewards/ keeps the contract of `rewards.Reward`. A new one is found by itself."""

import importlib
import inspect
import json
import pkgutil
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import rewards
from flowalign.glyphs import held_out_prompts
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import render
from rewards import (
    OCR,
    ColorAccuracy,
    JPEGCompressibility,
    RapidReader,
    Reward,
    RewardBatch,
    RewardError,
    RewardOutput,
    RewardSpec,
    channels_of,
    score,
)  # fmt: skip
from rewards.remote.description import build, describe, fingerprint
from tests.helpers.remote_rewards import jpeg_server

# class -> its arguments, for rewards that have no defaults or are slow with them
ARGUMENTS: dict[str, Callable[[], dict[str, object]]] = {
    "Channels": lambda: {"rewards": [JPEGCompressibility(), ColorAccuracy()]},
    "FunctionReward": lambda: {"path": "flowalign.diagnostics.measure:brightness", "differentiable": True},
    "Http": lambda: {"reward": JPEGCompressibility(), "url": jpeg_server()},
    "InWorker": lambda: {"reward": JPEGCompressibility()},
    "Mix": lambda: {"rewards": [JPEGCompressibility(), OCR(recognizer=RapidReader(workers=1))], "weights": [0.1, 1.0]},
    "OCR": lambda: {"recognizer": RapidReader(workers=1)},
    "WithTimeout": lambda: {"reward": JPEGCompressibility(), "timeout": 60.0, "batch_size": 2},
}


def reward_classes() -> list[type]:
    """The classes defined in rewards/ and its folders that have the members of the protocol."""
    modules = [importlib.import_module(info.name) for info in pkgutil.walk_packages(rewards.__path__, "rewards.")]
    classes = {
        found
        for module in modules
        for found in vars(module).values()
        if inspect.isclass(found) and found.__module__ == module.__name__ and found is not Reward
    }
    return sorted((found for found in classes if has_members(found)), key=lambda found: found.__name__)


def has_members(found: type) -> bool:
    attributes = {*dir(found), *vars(found).get("__dataclass_fields__", {})}
    return {"name", "__call__", "load", "close"} <= attributes and "__call__" in vars(found)


def made(found: type) -> Reward:
    try:
        return found(**ARGUMENTS.get(found.__name__, dict)())
    except TypeError as error:
        pytest.fail(f"{found.__name__} needs arguments ({error}): add them to ARGUMENTS in {__file__}")


def batch() -> RewardBatch:
    """Six Glyphs, two of them equal, of which the last does not show what its prompt asks for."""
    records = [*held_out_prompts()[:5], held_out_prompts()[0]]
    words, inks, papers = ([record[key] for record in records] for key in ("target", "ink", "paper"))
    return RewardBatch(
        prompts=[record["prompt"] for record in records],
        images=render([*words[:5], "ZZZZ"], inks, [*papers[:5], "cyan" if papers[0] != "cyan" else "white"]),
        metadata=[{**record, "palette": {**INKS, **PAPERS}} for record in records],
    )


@pytest.fixture(params=reward_classes(), ids=lambda found: found.__name__, scope="module")
def reward(request: pytest.FixtureRequest) -> Iterator[Reward]:
    reward = made(request.param)
    yield reward
    reward.close()


def equal(ours: RewardOutput, other: RewardOutput) -> None:
    assert torch.equal(ours.valid, other.valid)
    torch.testing.assert_close(ours.scores, other.scores, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_walk_finds_the_rewards() -> None:
    names = {found.__name__ for found in reward_classes()}
    assert {
        "ColorAccuracy",
        "FunctionReward",
        "JPEGCompressibility",
        "Mix",
        "OCR",
        "WithTimeout",
        "Channels",
        "InWorker",
        "Http",
    } <= names
    assert not {"Engine", "RapidReader", "Recognizer", "Reward", "Workers"} & names


def test_every_argument_is_of_a_reward() -> None:
    assert set(ARGUMENTS) <= {found.__name__ for found in reward_classes()}


@pytest.mark.parametrize("found", reward_classes(), ids=lambda found: found.__name__)
def test_construction_is_cheap_and_close_may_be_called_again(found: type) -> None:
    made(found)  # the first one may import
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        reward = made(found)
        seconds.append(time.perf_counter() - began)
        reward.close()
        reward.close()
    assert min(seconds) < 0.05, f"{found.__name__} loads something at construction: move it into load"


@pytest.mark.parametrize("found", reward_classes(), ids=lambda found: found.__name__)
def test_another_process_can_build_it(found: type) -> None:
    """So `InWorker` can take it, and a server can be asked for it."""
    reward = made(found)
    description = json.loads(json.dumps(describe(reward)))
    other = build(description)
    assert type(other) is found and (other.name, other.spec) == (reward.name, reward.spec)
    assert describe(other) == description and fingerprint(other) == fingerprint(reward)


def test_the_form_of_an_answer(reward: Reward) -> None:
    assert isinstance(reward.name, str) and reward.name and isinstance(reward.spec, RewardSpec)
    output, channels = score(reward, batch()), channels_of(reward)
    assert output.scores.shape == output.valid.shape == (6, len(channels)) and output.channels == channels
    assert output.scores.dtype == torch.float32 and bool(output.valid.all())
    assert all(part.dtype == torch.float32 and part.shape == (6,) for part in output.components.values())
    assert len(output.info) == 6
    assert all(len(column.unique()) > 1 for column in output.scores.T)  # else the tests below compare constants
    assert score(reward, batch().select([])).scores.shape == (0, len(channels))


def test_a_batch_without_what_its_spec_reads_is_refused(reward: Reward) -> None:
    assert reward.spec.inputs == ("images",)
    with pytest.raises(RewardError, match="expected images, which it reads"):
        score(reward, RewardBatch(prompts=["p"]))


def test_a_gradient_is_given_or_refused_as_its_spec_says(reward: Reward) -> None:
    pixels = batch()
    assert pixels.images is not None
    pixels.images.requires_grad_()
    if not reward.spec.differentiable:
        with pytest.raises(RewardError, match="which this is not"):
            score(reward, pixels, grad=True)
        return
    (gradient,) = torch.autograd.grad(score(reward, pixels, grad=True).scores.sum(), pixels.images)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_a_score_depends_neither_on_batch_mates_nor_on_order(reward: Reward) -> None:
    together, order = score(reward, batch()), [4, 0, 5, 2, 1, 3]
    shuffled = score(reward, batch().select(order))
    equal(RewardOutput(together.scores[order], together.valid[order]), shuffled)
    for i in range(6):
        equal(RewardOutput(together.scores[i : i + 1], together.valid[i : i + 1]), score(reward, batch().select([i])))


def test_an_image_that_is_not_finite_is_masked_and_harms_no_other(reward: Reward) -> None:
    together, broken = score(reward, batch()), batch()
    assert broken.images is not None
    broken.images[2, 1, 3, 3] = torch.nan
    output, others = score(reward, broken), [0, 1, 3, 4, 5]
    assert output.valid.all(1).tolist() == output.valid.any(1).tolist() == [True, True, False, True, True, True]
    assert bool(output.scores[2].isnan().all())
    torch.testing.assert_close(output.scores[others], together.scores[others], rtol=1e-5, atol=1e-6)


def test_it_answers_again_after_close(reward: Reward) -> None:
    before = score(reward, batch())
    reward.close()
    reward.close()
    reward.load()
    equal(score(reward, batch()), before)
