"""Which settings a resumed run may change: speed freely, bounds with run.resume=changed, what is saved never."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign import build
from flowalign.config import load_config
from flowalign.data import PromptRecord
from flowalign.errors import ConfigError
from flowalign.models import Policy
from flowalign.run import folder as folder_module
from flowalign.run.folder import describe, open_folder
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.files import write_atomic
from flowalign.storage.metrics_log import read_rows
from tests.helpers.tiny_run import CONFIG, run_it

MAX_DRIFT = "trainer.init_args.max_drift"


@pytest.fixture
def run(finished_run: Path) -> Path:
    return finished_run


def changed(run: Path, **settings: Any) -> dict[str, Any]:
    """The saved configuration with other values at dotted keys (given with __ for the dots)."""
    plain = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in settings.items():
        *sections, name = key.split("__")
        section = plain
        for each in sections:
            section = section[int(each) if each.isdigit() else each]
        section[name] = value
    return plain


def changes(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "provenance.json").read_text()).get("changes", [])


# ------------------------------------------------------------------------------------------ a bound that was too small


def drift_from(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From this iteration on the update's forwards differ from the rollout's, as rounding in bf16 makes them differ."""
    original, load, current = Run.prompts, build.load_policy, [0]

    def prompts(self: Run, number: int) -> list[PromptRecord]:
        current[0] = number
        return original(self, number)

    def shift(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (output[0] * 1.001, *output[1:]) if torch.is_grad_enabled() and current[0] >= iteration else None

    def load_drifting(*args: Any, **kwargs: Any) -> Policy:
        policy = load(*args, **kwargs)
        [network] = policy.modules().values()
        network.register_forward_hook(shift)
        return policy

    monkeypatch.setattr(Run, "prompts", prompts)
    monkeypatch.setattr(build, "load_policy", load_drifting)


def test_a_run_that_drifts_beyond_its_bound_goes_on_with_a_wider_one(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drift_from(2, monkeypatch)
    narrow, wide = f"{MAX_DRIFT}=1.0e-6", f"{MAX_DRIFT}=1.0e-1"
    for _ in range(2):  # the same command stops at the same place
        with pytest.raises(RuntimeError, match="drift"):
            run_it(tiny_pipeline, tmp_path, narrow)
    run = tmp_path / "tiny"
    with pytest.raises(ConfigError, match=rf"different: {MAX_DRIFT}.* run\.resume=changed"):
        run_it(tiny_pipeline, tmp_path, wide)
    run_it(tiny_pipeline, tmp_path, wide, "run.resume=changed")
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert 1e-6 < rows[2]["ratio/drift_max"] < 1e-2
    assert changes(run) == [{"after_iteration": 2, "settings": {MAX_DRIFT: {"from": 1e-6, "to": 1e-1}}}]
    assert f"goes on after iteration 2 with another {MAX_DRIFT}: 1e-06 -> 0.1" in capsys.readouterr().out
    run_it(tiny_pipeline, tmp_path, wide, "run.iterations=4")  # from now on the new configuration is the run's own
    assert len(changes(run)) == 1


# ------------------------------------------------------------------------------------------ speed


def test_batch_sizes_change_freely_and_are_noted(run: Path, tiny_pipeline: Path) -> None:
    run_it(
        tiny_pipeline, run.parent, "run.iterations=2", "rollout.micro_batch=2", "trainer.micro_batch=1",
        "evaluation.batch_size=3",
    )  # fmt: skip
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
    [change] = changes(run)
    assert change["after_iteration"] == 1
    assert change["settings"] == {
        "rollout.micro_batch": {"from": 64, "to": 2},
        "trainer.init_args.micro_batch": {"from": 16, "to": 1},
        "evaluation.batch_size": {"from": 64, "to": 3},
    }


def test_any_trainers_micro_batch_and_a_rewards_workers_are_speed(run: Path) -> None:
    trainer = {"class_path": "mine.Trainer", "init_args": {"micro_batch": 8, "loss": {"micro_batch": 3}}}
    ocr = {"class_path": "rewards.OCR", "init_args": {"recognizer": {"init_args": {"workers": 2, "detect": True}}}}
    rewards = [copy.deepcopy(ocr) for _ in range(2)]  # not one object: YAML would write an alias
    begun = changed(run, trainer=trainer, reward=ocr, evaluation__rewards=rewards)
    (run / "config.yaml").write_text(yaml.safe_dump(begun))
    recognizer = "init_args__recognizer__init_args"
    speed = {"trainer__init_args__micro_batch": 1, f"reward__{recognizer}__workers": 1}
    open_folder(run, changed(run, **speed, **{f"evaluation__rewards__1__{recognizer}__workers": 1})).close()
    for key, other in (("trainer__init_args__loss__micro_batch", 1), (f"reward__{recognizer}__detect", False)):
        with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
            open_folder(run, changed(run, **{key: other}))


def test_where_a_reward_lives_changes_freely_and_is_noted(run: Path) -> None:
    """Its scores are the same there, and a server may have moved. Another reward at that place is another reward."""
    jpeg = changed(run)["reward"]
    for place in (
        "{worker: {timeout: 5}}",
        "{http: {url: 'http://127.0.0.1:9'}}",
        "{http: {url: 'http://127.0.0.1:8'}}",
        "null",
    ):
        overrides = [
            f"policy.path={changed(run)['policy']['path']}",
            f"run.output={run.parent}",
            f"reward.place={place}",
        ]
        _, plain = load_config(CONFIG, [*overrides, "run.iterations=1"])
        open_folder(run, plain).close()
        describe(run, plain)
    first = changes(run)[0]["settings"]
    assert first["reward.class_path"] == {"from": "rewards.JPEGCompressibility", "to": "rewards.InWorker"}
    assert changes(run)[2]["settings"] == {
        "reward.init_args.url": {"from": "http://127.0.0.1:9", "to": "http://127.0.0.1:8"}
    }
    assert changed(run)["reward"] == jpeg
    for other in ({"class_path": "rewards.OCR"}, {**jpeg, "init_args": {"quality": 3}}):
        placed = {"class_path": "rewards.InWorker", "init_args": {"reward": other}}
        with pytest.raises(ConfigError, match=r"got another reward\."):
            open_folder(run, changed(run, reward=placed))
    accepted = {"class_path": "rewards.Http", "init_args": {"reward": jpeg, "fingerprint": "0" * 16}}
    with pytest.raises(ConfigError, match=r"got another reward\.fingerprint"):
        open_folder(run, changed(run, reward=accepted))


def test_what_is_only_shown_or_kept_changes_without_a_word(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"trackers": ["tensorboard"], "project": "mine", "tags": ["wide"], "checkpoint_every": 2}
    (run / "config.yaml").write_text(yaml.safe_dump(changed(run, run__trackers=["wandb"], run__tags=["narrow"])))
    plain = changed(run, **{f"run__{key}": value for key, value in shown.items()}, evaluation__every=1)
    open_folder(run, plain).close()
    describe(run, plain)
    assert changes(run) == [] and "goes on" not in capsys.readouterr().out


def test_memory_changes_freely_and_is_noted(run: Path) -> None:
    switches = {"gradient_checkpointing": True, "compile": True, "attention": "native"}
    memory = {"decode_batch": 2, "offload": ["vae", "encoders"], **switches}
    plain = changed(run, rollout__fixed_rows=True, **{f"policy__{key}": value for key, value in memory.items()})
    open_folder(run, plain).close()
    describe(run, plain)
    assert changes(run)[0]["settings"].keys() == {"rollout.fixed_rows", *(f"policy.{key}" for key in memory)}


def prompts_of(pipeline: Path, output: Path, text: str, *overrides: str) -> None:
    (output / "mine.txt").write_text(text)
    run_it(pipeline, output, f"prompts={output}/mine.txt", *overrides)


def test_training_prompts_change_if_that_is_said_and_it_is_noted(tiny_pipeline: Path, tmp_path: Path) -> None:
    prompts_of(tiny_pipeline, tmp_path, "a cat\na dog\n", "run.iterations=1")
    longer = "a cat\na dog\na much longer prompt about a hen\n"
    with pytest.raises(ConfigError, match=r"mine\.txt have changed .* set run\.resume=changed"):
        prompts_of(tiny_pipeline, tmp_path, longer, "run.iterations=2")
    prompts_of(tiny_pipeline, tmp_path, longer, "run.iterations=2", "run.resume=changed")
    [change] = changes(tmp_path / "tiny")
    former, now = change["settings"]["prompts.train"].values()
    assert change["after_iteration"] == 1 and former != now
    prompts_of(tiny_pipeline, tmp_path, longer, "run.iterations=3")  # from now on these are the run's own
    assert len(changes(tmp_path / "tiny")) == 1


# ------------------------------------------------------------------------------------------ never


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy__path", "elsewhere"),
        ("policy__dtype", "bf16"),
        ("policy__trainable", "full"),
        ("policy__lora__rank", 8),
        ("policy__roles", {"old": {"update": "copy", "every": 1, "decay": 0.9, "rate": None}}),
        ("policy__height", 48),
        ("policy__vae_tiling", True),
        ("run__ema_decay", 0.9),
        ("trainer__class_path", "mine.Trainer"),
        ("evaluation__num_inference_steps", 3),
        ("evaluation__rewards__0__class_path", "rewards.OCR"),
        ("reward__class_path", "rewards.JPEGIncompressibility"),
    ],
)
def test_what_the_saved_tensors_belong_to_is_never_changed(run: Path, key: str, value: Any) -> None:
    plain = changed(run, run__resume="changed", **{key: value})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"got another {key.replace('__', '.')}.* saved weights"):
        open_folder(run, plain)
    assert {path: path.read_bytes() for path in before} == before


def test_an_average_may_get_another_decay(run: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(changed(run, run__ema_decay=0.5)))
    open_folder(run, changed(run, run__ema_decay=0.9, run__resume="changed")).close()
    with pytest.raises(ConfigError, match=r"run\.ema_decay"):
        open_folder(run, changed(run, run__ema_decay=None, run__resume="changed"))


# ------------------------------------------------------------------------------------------ what is noted is true


def test_changed_hyper_parameters_reach_a_restored_optimizer(run: Path, tiny_pipeline: Path) -> None:
    overrides = ["trainer.init_args.optimizer.weight_decay=0.5", "trainer.init_args.optimizer.lr=0.01"]
    run_it(tiny_pipeline, run.parent, *overrides, "run.iterations=2", "run.resume=changed")
    _, state = checkpoint.load(run / "checkpoints" / "step-2")
    [group] = state["optimizers"]["policy"]["groups"]
    assert (group["hyper"]["weight_decay"], group["hyper"]["lr"]) == (0.5, 0.01)


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_kill_between_any_two_writes_keeps_the_note(run: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    plain = changed(run, rollout__micro_batch=2)

    def dying(counted: list[Path]) -> Callable[[Path, bytes], None]:
        def write(path: Path, data: bytes) -> None:
            if len(counted) == writes:
                raise SystemExit
            counted.append(path)
            write_atomic(path, data)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_atomic", dying([]))
        try:
            describe(run, copy.deepcopy(plain))
        except SystemExit:
            assert writes < 3
    describe(run, plain)  # the next start
    assert changes(run) == [{"after_iteration": 1, "settings": {"rollout.micro_batch": {"from": 64, "to": 2}}}]
    assert yaml.safe_load((run / "config.yaml").read_text())["rollout"]["micro_batch"] == 2
