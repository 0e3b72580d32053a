"""Every reward in rewards/ keeps the contract of `rewards.Reward`. A new one is found by itself."""

import importlib
import inspect
import json
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import rewards
from flowalign.glyphs import held_out_prompts
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import render
from rewards import (
    OCR,
    CLIPScore,
    ColorCloseness,
    Detections,
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
from rewards.listing import EXAMPLES
from rewards.remote.description import build, describe, fingerprint
from tests.helpers import tiny_qwen
from tests.helpers import tiny_rewards as tiny
from tests.helpers.inverse_dynamics import CentroidShift
from tests.helpers.judge_server import bright_judge
from tests.helpers.remote_rewards import jpeg_server


class Corners:
    """A detector for GenEval: a person wherever the left half of the picture is darker than its right half."""

    checkpoint = ""

    def detect(self, images: torch.Tensor, classes: Sequence[str]) -> list[Detections]:
        left, right = (half.float().mean((1, 2, 3)) for half in images.chunk(2, dim=3))
        box, one = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
        return [Detections(box[:n], one[:n], torch.zeros(n)) for n in (left < right).long().tolist()]

    def load(self) -> None: ...

    def close(self) -> None: ...


SEEN = ("brightness", "contrast", "saturation", "edges", "high_frequency", "flat")  # no Glyph has a black pixel
# class -> its arguments, where those of rewards.listing load a network, ask a server or are slow
ARGUMENTS: dict[str, Callable[[], dict[str, object]]] = {
    **EXAMPLES,
    "Aesthetic": lambda: {"head": str(tiny.aesthetic_head("relu")), "clip": str(tiny.clip(768))},
    "CLIPScore": lambda: {"model": "glyphs"},
    "HPSv2": lambda: {"model": str(tiny.hps()), "architecture": str(tiny.hps() / "architecture.json")},
    "ImageReward": lambda: {"model": str(tiny.image_reward()), "tokenizer": str(tiny.image_reward())},
    "PickScore": lambda: {"model": str(tiny.clip())},
    "SourceSimilarity": lambda: {"model": str(tiny.clip())},
    **{
        name: lambda: {"endpoint": bright_judge()}
        for name in ("DeQA", "EditScore", "Questions", "QwenVL", "UnifiedReward", "UnifiedWinRate", "WISE")
    },
    **tiny_qwen.ARGUMENTS,
    "FunctionReward": lambda: {"path": "flowalign.diagnostics.measure:brightness", "differentiable": True},
    "GenEval": lambda: {"detector": Corners()},
    "Http": lambda: {"reward": JPEGCompressibility(), "url": jpeg_server()},
    "ImageStatistics": lambda: {"statistics": SEEN},
    "InverseDynamics": lambda: {"model": CentroidShift(reach=6, sharpness=0.1), "soft": True},
    "Mix": lambda: {"rewards": [JPEGCompressibility(), OCR(recognizer=RapidReader(workers=1))], "weights": [0.1, 1.0]},
    "OCR": lambda: {"recognizer": RapidReader(workers=1)},
    "PARM": lambda: {"endpoint": bright_judge(), "sigma": 0.0},
    "Offloaded": lambda: {"reward": CLIPScore(str(tiny.open_clip_folder()))},
    "Routed": lambda: {
        "key": "ink", "rewards": {"red": ColorCloseness(), "green": JPEGCompressibility()}, "default": ColorCloseness("paper"),
    },
    "WithTimeout": lambda: {"reward": JPEGCompressibility(), "timeout": 60.0, "batch_size": 2},
}  # fmt: skip


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
    """Six Glyphs in three groups, two of them equal, of which the last does not show what its prompt asks for; as videos they run
    sideways, each at its own speed. GenEval's clauses ask for a person; for the judges each has a source image, a question and
    an explanation, and for InverseDynamics its actions."""
    records = [*held_out_prompts()[:5], held_out_prompts()[0]]
    words, inks, papers = ([record[key] for record in records] for key in ("target", "ink", "paper"))
    images = render([*words[:5], "ZZZZ"], inks, [*papers[:5], "cyan" if papers[0] != "cyan" else "white"])
    frames = [[image.roll(number * t, 2) for t in range(4)] for number, image in enumerate(images)]
    asked = {"vqa_list": [["Is it bright?", "Yes"]], "explanation": "none is needed"}
    clauses = {"tag": "single_object", "include": [{"class": "person", "count": 1}]}
    return RewardBatch(
        prompts=[record["prompt"] for record in records],
        images=images,
        videos=torch.stack([torch.stack(each) for each in frames]),
        fps=8.0,
        metadata=[
            {**record, **asked, **clauses, "palette": {**INKS, **PAPERS}, "actions": [number] * 3}
            for number, record in enumerate(records)
        ],
        conditions=[[image] for image in render(words, inks, papers)],
        group_ids=[0, 0, 1, 1, 2, 2],
    )


def units(reward: Reward) -> list[list[int]]:
    """Which samples may be scored apart from the others."""
    return [[0, 1], [2, 3], [4, 5]] if reward.spec.groupwise else [[i] for i in range(6)]


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
        "Http",
        "InWorker",
        "JPEGCompressibility",
        "Mix",
        "OCR",
        "OnFrames",
    } <= names
    assert not {"Engine", "RapidReader", "Recognizer", "Reward", "Workers", "Thumbnail", "Detector"} & names


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
def test_it_is_a_key_that_equals_only_itself(found: type) -> None:
    """As in `rewards={CLIPScore("glyphs"): 1.0, OCR(): 0.5}`; two that are built alike keep a weight each."""
    one, two = found(**(arguments := ARGUMENTS.get(found.__name__, dict)())), found(**arguments)
    assert {one: 1.0, two: 0.5}[one] == 1.0 and one != two


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
    assert reward.spec.inputs in (("images",), ("videos",), ("images", "conditions"))
    with pytest.raises(RewardError, match=f"expected {' and '.join(reward.spec.inputs)}, which it reads"):
        score(reward, RewardBatch(prompts=["p"]))


def test_a_gradient_is_given_or_refused_as_its_spec_says(reward: Reward) -> None:
    pixels = batch()
    read = pixels.tensors()[reward.spec.inputs[0]].requires_grad_()
    if not reward.spec.differentiable:
        with pytest.raises(RewardError, match="which this is not"):
            score(reward, pixels, grad=True)
        return
    (gradient,) = torch.autograd.grad(score(reward, pixels, grad=True).scores.sum(), read)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_the_networks_with_a_gradient_are_those_that_have_a_test_of_it() -> None:
    """In fp64, each against finite differences: tests/rewards/image/test_laws.py and tests/rewards/qwen/test_laws.py."""
    made_so = {found.__name__: made(found) for found in reward_classes()}
    assert {name for name, reward in made_so.items() if reward.spec.differentiable and "dtype" in vars(reward)} == {
        "Aesthetic", "CLIPScore", "EditReward", "HPSv2", "HPSv3", "ImageReward", "PickScore", "SourceSimilarity",
        "VideoAlign",
    }  # fmt: skip


@pytest.mark.parametrize("found", reward_classes(), ids=lambda found: found.__name__)
def test_a_gradient_is_that_of_finite_differences(found: type) -> None:
    """Of noisy pictures, since flat ones lie on kinks; networks elsewhere."""
    reward = found(CLIPScore(str(tiny.clip()), dtype="fp64")) if found is rewards.Offloaded else made(found)
    if not reward.spec.differentiable or "dtype" in vars(reward):
        return
    (name, *_), draws, given = reward.spec.inputs, torch.Generator().manual_seed(0), batch().select([0, 2, 5])
    pixels = 0.1 + 0.7 * given.tensors()[name].double()
    pixels += 0.1 * torch.rand(pixels.shape, generator=draws, dtype=torch.float64)

    def total(read: torch.Tensor) -> torch.Tensor:
        return score(reward, replace(given, **{name: read}), grad=True).scores.sum()

    (gradient,) = torch.autograd.grad(total(leaf := pixels.clone().requires_grad_()), leaf)
    along = 1e-7 * torch.randn(pixels.shape, generator=draws, dtype=torch.float64)
    with torch.no_grad():
        change = (total(pixels + along) - total(pixels - along)) / 2
    torch.testing.assert_close((gradient * along).sum() / 1e-7, change.detach() / 1e-7, rtol=1e-3, atol=1e-6)
    assert float(gradient.abs().max()) > 0
    reward.close()


def test_a_score_depends_neither_on_batch_mates_nor_on_order(reward: Reward) -> None:
    together, order = score(reward, batch()), [4, 0, 5, 2, 1, 3]
    shuffled = score(reward, batch().select(order))
    equal(RewardOutput(together.scores[order], together.valid[order]), shuffled)
    for rows in units(reward):
        equal(RewardOutput(together.scores[rows], together.valid[rows]), score(reward, batch().select(rows)))


def test_an_input_that_is_not_finite_is_masked_and_harms_no_other(reward: Reward) -> None:
    together, broken = score(reward, batch()), batch()
    broken.tensors()[reward.spec.inputs[0]][2, ..., 1, 3, 3] = torch.nan
    output, harmed = score(reward, broken), next(rows for rows in units(reward) if 2 in rows)
    others = [i for i in range(6) if i not in harmed]
    assert output.valid.all(1).tolist() == output.valid.any(1).tolist() == [i in others for i in range(6)]
    assert bool(output.scores[harmed].isnan().all())
    torch.testing.assert_close(output.scores[others], together.scores[others], rtol=1e-5, atol=1e-6)


def test_it_answers_again_after_close(reward: Reward) -> None:
    before = score(reward, batch())
    reward.close()
    reward.close()
    reward.load()
    equal(score(reward, batch()), before)
