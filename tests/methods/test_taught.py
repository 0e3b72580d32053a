"""Distillation on the bed, through the real trainer and its layers: a student comes near its teacher, at the forecast cost."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.config import load_config
from flowalign.loop import train
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from tests.helpers.bed import MEANS, NAMES
from tests.helpers.bed_run import CONFIG, Bed
from tests.helpers.method_layers import ON_GLYPHS, TAUGHT


def tasks() -> list[dict]:
    """The prompts of the bed, each with a label: which side it is on."""
    return [{"prompt": name, "task": name.split()[1]} for name in NAMES]


@pytest.fixture(scope="module")
def teacher(pipeline: Path) -> tuple[list[Tensor], float]:
    """Weights that Flow-GRPO has trained, and their reward."""
    bed = Bed.of(pipeline, ["configs/methods/flow_grpo.yaml"], "rollout.group_size=12")
    for number in range(8):
        bed.iteration(number)
    return [parameter.detach().clone() for _, parameter in bed.policy.parameters_of("policy")], bed.reward()


@torch.no_grad()
def put(bed: Bed, role: str, weights: list[Tensor]) -> None:
    for (_, parameter), value in zip(bed.policy.parameters_of(role), weights, strict=True):
        parameter.copy_(value)


def taught(pipeline: Path, method: str, weights: list[Tensor], *overrides: str) -> Bed:
    bed = Bed.of(pipeline, [f"configs/methods/{method}.yaml"], *ON_GLYPHS.get(method, ()), *overrides)
    if method == "cfg_distillation":  # the base of the bed does not look at its prompt, so guidance would do nothing
        for role in ("policy", "reference"):
            put(bed, role, weights)
    else:
        put(bed, "teacher", weights)
    return bed


CHANGES = {"dance_opd": ("rollout.group_size=16",), "flow_opd": ("trainer.anchor=null",)}


@pytest.mark.parametrize("method", TAUGHT)
def test_a_student_comes_near_its_teacher_at_the_forecast_cost(pipeline: Path, teacher, method: str) -> None:
    bed = taught(pipeline, method, teacher[0], *CHANGES.get(method, ()))
    before, gaps = bed.reward(), []
    rollout, update = bed.task.rollout, bed.trainer.forecast(bed.task.rollout)
    for number in range(10):
        found = bed.iteration(number)
        gaps.append(found.updates[-1]["distill/gap"])
        counted = [found.cost(name) for name in ("rollout", "trained", "frozen")]
        assert sum(counted) == pytest.approx(found.evaluations)
        assert counted[1:] == [update.trained, update.frozen] and len(found.updates) == update.updates
        assert counted[0] <= update.rolled and (method == "dance_opd" or counted[0] == update.rolled)
        assert found.cost("reward_calls") == found.reward_calls == (0 if method == "dance_opd" else found.batch.images)
    assert gaps[-1] < 0.3 * gaps[0], gaps
    if method in ("flow_opd", "diffusion_opd"):  # the others have a guided teacher
        assert bed.reward() > before + 0.6 * (teacher[1] - before)
    assert rollout.groups * rollout.group_size == found.batch.images


ROUTED = (
    "prompts=tests.methods.test_taught:tasks", "policy.roles={one: {init: reference}, two: {init: reference}}",
    "trainer.teachers={one: {}, two: {}}", "trainer.route={key: task, teachers: {east: one, west: two}}",
)  # fmt: skip


@pytest.mark.parametrize("split", ["groups", "teacher"])
def test_two_teachers_each_teach_their_own_prompts(pipeline: Path, split: str) -> None:
    """Teachers that push to opposite sides, a shift of the velocity in x."""
    bed = Bed.of(
        pipeline, ["configs/methods/diffusion_opd.yaml"], *ROUTED, f"trainer.split={split}", "rollout.group_size=8"
    )
    push = 0.5
    for role, side in (("one", -1.0), ("two", 1.0)):
        with torch.no_grad():
            dict(bed.policy.parameters_of(role))[f"{role}:out.bias"][0] += side * push
    gaps = []
    for number in range(18):
        found = bed.iteration(number)
        gaps.append([found.updates[-1].get(f"distill/gap_{role}", 0.0) for role in ("one", "two")])
        assert len(found.updates) == (2 if split == "teacher" else 1)
    records, where = list(bed.task.prompts), {}
    for record in records:
        x, sigma = torch.zeros(1, 2, 1, 1), torch.tensor([0.5])
        conditions = bed.policy.encode([record])
        with torch.no_grad():
            moved = bed.policy.velocity(x, sigma, conditions).flatten()[0]
            with bed.policy.role("reference"):
                moved = moved - bed.policy.velocity(x, sigma, conditions).flatten()[0]
        where[record.prompt] = float(moved)
    assert all(abs(value - (-push if name.endswith("east") else push)) < 0.25 for name, value in where.items()), where
    assert len(MEANS) == len(where)


def test_a_cold_start_learns_from_the_teachers_images_first(pipeline: Path, teacher) -> None:
    extra = ("trainer.cold_start={iterations: 3, draws: 2}", "trainer.anchor=null")
    bed = taught(pipeline, "flow_opd", teacher[0], *extra)
    update, names = bed.trainer.forecast(bed.task.rollout), []
    for number in range(4):
        found = bed.iteration(number)
        names.append(
            {key for row in found.updates for key in row if key.startswith(("draws/", "distill/"))} >= {"draws/error"}
        )
        assert found.evaluations <= update.rolled + update.trained + update.frozen
        assert sum(found.cost(name) for name in ("rollout", "trained", "frozen")) == pytest.approx(found.evaluations)
        if number < 3:  # its rollout is the teachers'
            assert found.cost("rollout") == 0 and found.cost("frozen") == found.batch.images * 10
            assert found.cost("trained") == 2 * found.batch.images
    assert names == [True, True, True, False]


# ------------------------------------------------------------------------------------------ stops, processes


def rows(folder: Path) -> list[dict]:
    return [without_time(row) for row in read_rows(folder / "bed" / "metrics.jsonl")]


def test_it_resumes_in_its_cold_start_and_after_it(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the base, so that only the cold start and the anchor move the student."""
    layers = ["configs/methods/flow_opd.yaml", CONFIG]
    given = [
        f"policy.path={pipeline}", "rollout.group_size=4", "evaluation.samples_per_prompt=1", "run.checkpoint_every=1",
        "run.iterations=3", "trainer.cold_start={iterations: 2}", *ON_GLYPHS["flow_opd"],
    ]  # fmt: skip
    original = Run.step

    def run(name: str, dies_at: int | None = None) -> Path:
        calls = []

        def step(self: Run, update) -> None:
            calls.append(1)
            if len(calls) == dies_at:
                raise KeyError("killed")
            original(self, update)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", step)
            train(*load_config(layers, [*given, f"run.output={tmp_path / name}"]))
        return tmp_path / name

    whole = run("whole")
    for dies_at in (4, 6):  # two updates an iteration: in the second of the cold start, and in the first after it
        with pytest.raises(KeyError):
            run(f"killed-{dies_at}", dies_at)
        again = run(f"killed-{dies_at}")
        tensors = [checkpoint.load(checkpoint.latest(folder / "bed"))[0]["role_policy"] for folder in (whole, again)]
        assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())
        assert rows(whole) == rows(again)
    assert [row for row in rows(whole) if "draws/error" in row] == rows(whole)[:2]
