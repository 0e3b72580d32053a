"""The run folder: started again, extended, killed, opened twice, with lost or damaged files; nothing is lost."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from flowalign.errors import ConfigError
from flowalign.evaluation.result_file import load_result
from flowalign.run import interrupt
from flowalign.run import run as run_module
from flowalign.run.folder import describe, open_folder
from flowalign.run.interrupt import Interrupted
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.files import DamagedFile
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import Update
from tests.helpers.forks import Forks
from tests.helpers.tiny_run import result, run_it


@pytest.fixture(scope="module")
def done(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations on prompt files of its own."""
    output = tmp_path_factory.mktemp("done")
    (output / "prompts.txt").write_text("a cat\na dog\na <b>cow</b>\na hen\n")
    start(tiny_pipeline, output)
    return output


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path


def start(pipeline: Path, output: Path, *overrides: str) -> dict:
    prompts = f"{output}/prompts.txt"
    return run_it(
        pipeline,
        output,
        f"prompts={prompts}",
        f"evaluation.prompts={prompts}",
        "evaluation.allow_training_prompts=true",
        "run.iterations=2",
        *overrides,
    )


def as_saved(folder: Path, **changes: object) -> dict:
    """The configuration that a run saved, with changes in its section `run`."""
    plain = yaml.safe_load((folder / "tiny" / "config.yaml").read_text())
    return {**plain, "run": {**plain["run"], **changes}}


def evaluations(output: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["label"]) for row in read_rows(output / "tiny" / "evaluations.jsonl")]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("flowalign.build.load_policy", loaded)


# ------------------------------------------------------------------------------------------ the same command again


def test_a_finished_run_started_again_and_then_extended_equals_one_long_run(
    done: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    prompts = f"prompts={done}/prompts.txt"
    names = ["run.ema_decay=0.5", prompts, f"evaluation.{prompts}", "evaluation.allow_training_prompts=true"]
    for iterations in (1, 1, 2):
        run_it(tiny_pipeline, tmp_path / "extended", *names, f"run.iterations={iterations}")
    run_it(tiny_pipeline, tmp_path / "uninterrupted", *names, "run.iterations=2")
    (tensors, state, rows), (expected, expected_state, expected_rows) = (
        result(tmp_path / name) for name in ("extended", "uninterrupted")
    )
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (state, rows) == (expected_state, expected_rows)
    assert evaluations(tmp_path / "extended") == [(0, "base"), (1, "tuned"), (2, "tuned")]  # one row each
    assert evaluations(tmp_path / "uninterrupted") == [(0, "base"), (2, "tuned")]


def test_fewer_iterations_than_done_are_refused_and_nothing_is_lost(copy: Path, no_model: None) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"run\.iterations=1, but .* already at iteration 2"):
        open_folder(copy / "tiny", as_saved(copy, iterations=1))
    assert {path: path.read_bytes() for path in before} == before


def test_another_path_to_the_same_folder_is_no_other_configuration(copy: Path) -> None:
    before = (copy / "tiny" / "config.yaml").read_bytes()
    open_folder(copy / "tiny", as_saved(copy, output="../elsewhere")).close()  # no ConfigError
    assert (copy / "tiny" / "config.yaml").read_bytes() == before
    with pytest.raises(ConfigError, match="ema_decay"):
        open_folder(copy / "tiny", as_saved(copy, output="../elsewhere", ema_decay=0.7))


@pytest.mark.parametrize("every", [1, 10])
def test_ctrl_c_in_an_iteration_that_saves_anyway(
    every: int, done: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Run.backward

    def interrupted(self: Run, loss: torch.Tensor, update: Update) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes the terminal's Ctrl-C on once more
        original(self, loss, update)

    shutil.copy(done / "prompts.txt", tmp_path)
    monkeypatch.setattr(Run, "backward", interrupted)
    with pytest.raises(Interrupted, match="iteration 1"):
        start(tiny_pipeline, tmp_path, f"run.checkpoint_every={every}")
    assert [path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["step-1"]


def test_a_second_ctrl_c_stops_at_once(
    done: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Run, loss: torch.Tensor, update: Update) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    shutil.copy(done / "prompts.txt", tmp_path)
    monkeypatch.setattr(interrupt, "ONE_REQUEST", 0.0)
    monkeypatch.setattr(Run, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        start(tiny_pipeline, tmp_path)
    assert not (tmp_path / "tiny" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------ what cannot go on


def test_two_runs_cannot_share_a_folder(copy: Path, tiny_pipeline: Path, no_model: None) -> None:
    with open_folder(copy / "tiny", as_saved(copy)), pytest.raises(ConfigError, match="another process is training"):
        start(tiny_pipeline, copy, "run.iterations=3")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "iteration 2.*holds no checkpoint"),
        (lambda run: (run / "checkpoints/step-2/state.json").unlink(), r"state\.json is missing"),
        (lambda run: os.truncate(run / "checkpoints/step-2/role_policy.safetensors", 99), "has 99 bytes"),
        (lambda run: (run / "evaluation/base.safetensors").unlink(), r"base\.safetensors is missing"),
        (lambda run: os.truncate(run / "evaluation/base.safetensors", 99), r"base\.safetensors cannot be read"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), r"metrics\.jsonl, line 1"),
        (lambda run: os.truncate(run / "metrics.jsonl", 999), r"metrics\.jsonl lacks rows"),
        (lambda run: (run / "evaluations.jsonl").write_text("x\n"), r"evaluations\.jsonl, line 1"),
        (lambda run: (run / "evaluations.jsonl").unlink(), r"evaluations\.jsonl lacks rows"),
        (lambda run: (run / "config.yaml").write_text(""), r"config\.yaml is damaged"),
        (lambda run: (run / "config.yaml").unlink(), "is not a run"),
        (lambda run: (run.parent / "prompts.txt").write_text("a cat\na dog\na cow\na pig\n"), "changed since"),
    ],
)
def test_what_is_lost_or_damaged_is_named_before_a_model_is_loaded(
    damage, message: str, copy: Path, tiny_pipeline: Path, no_model: None
) -> None:
    plain = as_saved(copy, output=str(copy))
    plain["prompts"] = plain["evaluation"]["prompts"] = f"{copy}/prompts.txt"
    (copy / "tiny" / "config.yaml").write_text(yaml.safe_dump(plain))
    damage(copy / "tiny")
    metrics = (copy / "tiny" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        start(tiny_pipeline, copy)
    assert (copy / "tiny" / "metrics.jsonl").read_bytes() == metrics


def killed_before_the_first_checkpoint(copy: Path, checkpoint_every: int) -> None:
    """Turns the finished run into one that was killed before its first checkpoint."""
    shutil.rmtree(copy / "tiny" / "checkpoints")
    (copy / "tiny" / "summary.json").unlink()
    plain = as_saved(copy, checkpoint_every=checkpoint_every)
    plain["prompts"] = plain["evaluation"]["prompts"] = f"{copy}/prompts.txt"
    (copy / "tiny" / "config.yaml").write_text(yaml.safe_dump(plain))


def test_prompts_that_changed_before_the_first_checkpoint_are_evaluated_anew(
    copy: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_the_first_checkpoint(copy, checkpoint_every=10)
    (copy / "prompts.txt").write_text("a cat\na dog\na cow\na pig\n")
    monkeypatch.setattr(Run, "iterations", lambda run: ())
    monkeypatch.setattr(Run, "finish", lambda run: {})
    start(tiny_pipeline, copy, "run.checkpoint_every=10")
    base = load_result(copy / "tiny" / "evaluation" / "base.safetensors")
    assert base.prompts == ["a cat", "a dog", "a cow", "a pig"]
    assert evaluations(copy) == [(0, "base")]


def test_two_kills_around_another_checkpoint_every_before_the_first_checkpoint(
    copy: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows without a checkpoint are right with the old setting, not with the new one."""

    def killed(*args: object) -> None:
        describe(*args)
        raise SystemExit

    killed_before_the_first_checkpoint(copy, checkpoint_every=10)
    monkeypatch.setattr(run_module, "describe", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):  # the second time too: no ConfigError
            start(tiny_pipeline, copy, "run.checkpoint_every=1")


def test_a_place_that_cannot_be_written_is_named(done: Path, tiny_pipeline: Path, no_model: None) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .* choose another run\.output"):
        start(tiny_pipeline, done, f"run.output={done}/prompts.txt")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(images, prompts): return [0.0] * len(prompts)", "'shine' does not exist"),
        ("def shine(images, prompts): return [0.0]", "one per sample"),
        ("def shine(images, prompts): return None", "one number per sample"),
        ("def shine(images, prompts): raise KeyError('x')", "KeyError"),
        ("def shine(images, prompts, target): return [0.0] * len(prompts)", "metadata column 'target'"),
        ("def shine(images, prompts) return", "SyntaxError"),
    ],
)
def test_a_reward_that_cannot_work_is_named_before_a_model_is_loaded_and_leaves_the_name_free(
    body: str, message: str, done: Path, tiny_pipeline: Path, tmp_path: Path, no_model: None
) -> None:
    (tmp_path / "mine.py").write_text(body)
    reward = ["reward=rewards.FunctionReward", f"reward.path={tmp_path}/mine.py:shine", f"run.output={tmp_path}"]
    with pytest.raises(ConfigError, match=message):
        start(tiny_pipeline, done, *reward)
    assert not (tmp_path / "tiny" / "config.yaml").exists()


def test_equal_rewards_in_the_first_iteration_are_no_frozen_policy(
    done: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def shine(images, prompts): return [0.0] * len(prompts)")
    reward = ["reward=rewards.FunctionReward", f"reward.path={tmp_path}/mine.py:shine", f"run.output={tmp_path}"]
    start(tiny_pipeline, done, *reward, "run.iterations=1")
    assert read_rows(tmp_path / "tiny" / "metrics.jsonl")[0]["optim/grad_norm"] == 0
    _, state = checkpoint.load(tmp_path / "tiny" / "checkpoints" / "step-1")
    assert state["reached"] is False  # so a resumed run still looks for the first gradient


def test_an_update_without_anything_to_learn_moves_the_roles_on() -> None:
    """A role of `every` n updates is that of one rollout; an update that a selection left empty must not shift it."""
    followed = list[int]()
    run: Any = SimpleNamespace(
        task=SimpleNamespace(policy=SimpleNamespace(follow=followed.append)), progress=SimpleNamespace(updates=3),
        log=SimpleNamespace(add=lambda metrics: None),
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    for role in ("policy", "fake", "policy"):
        Run.step(run, Update(optimizer, 1.0, [], dict, role))
    assert followed == [4, 5]


def test_a_start_with_other_threads_is_printed_and_noted(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "tiny" / "provenance.json"
    first = json.loads(file.read_text())
    file.write_text(json.dumps({**first, "machine": "abacus, 1 threads"}))
    describe(copy / "tiny", as_saved(copy), rewards=first["rewards"])
    assert "begun with other machine" in capsys.readouterr().out
    now = json.loads(file.read_text())
    assert now["machine"] == "abacus, 1 threads" and now["later"] == [first]


def test_a_machine_without_git_and_a_damaged_provenance(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy / "tiny" / "provenance.json"
    file.unlink()
    monkeypatch.setenv("PATH", str(copy))
    describe(copy / "tiny", as_saved(copy))
    assert json.loads(file.read_text())["git"] is None
    file.write_text("{")
    with pytest.raises(DamagedFile, match=r"provenance\.json cannot be read .* or remove it"):
        describe(copy / "tiny", as_saved(copy))


# ------------------------------------------------------------------------------------------ SIGKILL

# In a process of one thread: a run in a forked child is killed after ever longer times until one finishes.
KILLER = """
import os, signal, sys, time
from flowalign.config import load_config
from flowalign.loop import train

def child(output):
    pid = os.fork()
    if pid == 0:
        train(*load_config(sys.argv[1], [f"policy.path={sys.argv[2]}", f"run.output={output}", "run.ema_decay=0.5"]))
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert ended(child(sys.argv[3] + "/uninterrupted")) == 0
uninterrupted, killed, waited = time.monotonic() - began, 0, 0.45
while True:
    pid = child(sys.argv[3] + "/killed")
    while killed == 0 and not os.path.exists(sys.argv[3] + "/killed/tiny/metrics.jsonl"):
        time.sleep(0.0005)  # first: right after the first row, before any checkpoint
    time.sleep(waited * uninterrupted if killed else 0.0)
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    if code == 0:
        break
    assert code == -signal.SIGKILL, f"the run refused to go on: exit code {code}"
    killed, waited = killed + 1, waited + 0.35
print(killed)
"""


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tiny_pipeline: Path, tmp_path: Path, forks: Forks) -> None:
    config = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
    message = forks.check("-c", KILLER, config, str(tiny_pipeline), str(tmp_path))
    assert int(message.split()[-1]) >= 1  # it was killed at least once
    (tensors, state, rows), (expected, expected_state, expected_rows) = (
        result(tmp_path / name) for name in ("killed", "uninterrupted")
    )
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert (state, rows) == (expected_state, expected_rows)
    results = [read_rows(tmp_path / name / "tiny" / "evaluations.jsonl") for name in ("killed", "uninterrupted")]
    assert [without_time(row) for row in results[0]] == [without_time(row) for row in results[1]]
