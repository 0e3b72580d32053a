"""Checkpoints: bit-exact round trips, every damage an error, no crash leaves half of one, nothing pickled (I7, I8)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from flowalign.storage import checkpoint
from flowalign.storage.checkpoint import CheckpointError, latest, load, save
from flowalign.storage.named_tensors import pack_optimizer, pack_parameters, restore_optimizer
from tests.helpers.trained_net import trained


def content(step):
    weights = {"a.weight": torch.full((3, 2), float(step)), "b": torch.arange(5, dtype=torch.bfloat16) * step}
    return {"model": weights, "ema": {"a.weight": torch.full((3, 2), -float(step))}}, {"step": step, "x": 0.1 * step}


def assert_is(path, step):
    tensors, state = load(path)
    expected, expected_state = content(step)
    assert state == expected_state
    assert {s: set(t) for s, t in tensors.items()} == {s: set(t) for s, t in expected.items()}
    for section, held in expected.items():
        for name, tensor in held.items():
            assert tensors[section][name].dtype == tensor.dtype
            assert torch.equal(tensors[section][name], tensor)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ round trip


def test_round_trip_keeps_bits_types_and_views(tmp_path):
    odd = torch.tensor([-0.0, 1e-42])
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"s": {"odd": odd, "view": base.T, "slice": base[1:], "scalar": torch.tensor(3.5, dtype=torch.float64)}}
    back, state = load(save(tmp_path, 7, {**tensors, "empty": {}}, {"x": 0.1, "list": [1, None, "σ"]}))
    assert torch.equal(back["s"]["odd"].view(torch.int32), odd.view(torch.int32))
    assert torch.equal(back["s"]["view"], base.T) and torch.equal(back["s"]["slice"], base[1:])
    assert back["s"]["scalar"].dtype == torch.float64 and back["s"]["scalar"].shape == ()
    assert back["empty"] == {} and state == {"x": 0.1, "list": [1, None, "σ"]}


def test_the_last_k_are_kept_and_latest_counts_by_number(tmp_path):
    assert latest(tmp_path) is None
    for step in (2, 9, 10, 100):
        save(tmp_path, step, *content(step), keep=3)
    assert names(tmp_path) == ["step-10", "step-100", "step-9"]
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-100"
    assert_is(latest(tmp_path), 100)


def test_saving_a_step_again_does_nothing_if_equal_and_is_an_error_if_not(tmp_path):
    first = save(tmp_path, 1, *content(1))
    born = (first / "manifest.json").stat().st_mtime_ns
    assert save(tmp_path, 1, *content(1)) == first
    assert (first / "manifest.json").stat().st_mtime_ns == born
    with pytest.raises(CheckpointError, match="exists with other content"):
        save(tmp_path, 1, *content(5))
    assert_is(first, 1)


def test_resuming_from_an_earlier_step_asks_for_the_later_ones_to_go(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, *content(step), keep=3)
    with pytest.raises(CheckpointError, match="already holds step-3: remove the later"):
        save(tmp_path, 2, *content(2))
    for later in (2, 3):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{later}")
    save(tmp_path, 2, *content(2))
    assert_is(latest(tmp_path), 2)


@pytest.mark.parametrize("state", [{"t": (1, 2)}, {"d": {1: 2}}, {"n": float("nan")}, {"tensor": torch.ones(1)}])
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match="state"):
        save(tmp_path, 1, {}, state)
    assert latest(tmp_path) is None


def test_sharded_weights_and_bad_section_names_are_refused_by_name(tmp_path):
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(CheckpointError, match=r"model, w: got a DTensor .*FSDP2"):
        save(tmp_path, 1, {"model": {"w": torch.ones(2).as_subclass(DTensor)}}, {})
    with pytest.raises(CheckpointError, match=r"section '\.\./up'"):
        save(tmp_path, 1, {"../up": {}}, {})


# --------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("part", ["model.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_every_damaged_part_is_an_error_that_names_the_file_and_the_way_out(tmp_path, part, damage):
    save(tmp_path, 1, *content(1))
    path = save(tmp_path, 2, *content(2))
    file = path / part
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-3])
    else:
        file.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(file) in str(error.value) and "remove" in str(error.value) and str(path) in str(error.value)
    assert_is(tmp_path / "checkpoints" / "step-1", 1)


def test_a_foreign_file_a_renamed_folder_and_another_format_are_errors(tmp_path):
    path = save(tmp_path, 2, *content(2))
    (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not listed"):
        load(path)
    (path / "optimizer.safetensors").unlink()
    moved = path.rename(path.with_name("step-3"))
    with pytest.raises(CheckpointError, match="is of step 2, but its folder is step-3"):
        load(moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match=r"got format 99 .*; expected 1:"):
        load(moved)


# ---------------------------------------------------------------------------------------------- kills

# Saves step 2 over step 1 in a forked child that dies at the k-th visit of a point (os._exit: no `finally` runs), then,
# in "random" runs, saves step after step until it is killed from outside. Forked from a fresh interpreter: no threads.
KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
from flowalign.storage.checkpoint import POINTS, latest, save, step_of
torch.set_num_threads(1)
from tests.storage.test_checkpoint import content

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def dying_save(run, point, visit):
    seen = []
    def hook(name):
        seen.append(name)
        if seen.count(point) == visit:
            os._exit(17)
    save(run, 2, *content(2), keep=1, hooks=hook)

for point in POINTS:
    for visit in ((1, 2) if point == "part_written" else (1,)):
        run = Path(sys.argv[1]) / f"{point}-{visit}"
        save(run, 1, *content(1))
        code = os.waitstatus_to_exitcode(os.waitpid(child(lambda: dying_save(run, point, visit)), 0)[1])
        assert code == 17, (point, visit, code)

for trial in range(12):
    run = Path(sys.argv[1]) / f"random-{trial}"
    save(run, 0, *content(0))
    pid = child(lambda: [save(run, step, *content(step), keep=2) for step in range(1, 100000)])
    while step_of(latest(run)) == 0:  # until it is busy saving, however loaded the machine
        time.sleep(0.0005)
    time.sleep(0.0013 * trial)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLER, str(folder)], check=True, env=environment, timeout=300)
    return folder


@pytest.mark.parametrize(
    ("point", "survivor"),
    [
        ("part_written-1", 1),
        ("part_written-2", 1),
        ("before_rename-1", 1),
        ("after_rename-1", 2),
        ("before_prune-1", 2),
    ],
)
def test_a_crash_at_a_named_point_leaves_the_former_or_the_new_checkpoint_whole(killed, point, survivor):
    run = killed / point
    assert_is(latest(run), survivor)
    assert any(name.startswith(".tmp-") for name in names(run)) == (survivor == 1)  # the crash did leave litter
    save(run, 3, *content(3), keep=1)
    assert names(run) == ["step-3"]  # and the next save cleared it
    assert_is(latest(run), 3)


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(killed):
    for run in sorted(killed.glob("random-*")):
        for path in (run / "checkpoints").glob("step-*"):
            assert_is(path, checkpoint.step_of(path))
        assert checkpoint.step_of(latest(run)) > 0  # the kill did fall among saves
        save(run, 10**6, *content(10**6), keep=1)
        assert names(run) == ["step-1000000"]


def test_every_file_and_folder_is_on_the_disk_before_the_rename_and_the_rename_before_the_prune(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(checkpoint, "fsync", lambda path: events.append(path.name))
    save(tmp_path, 1, *content(1))
    events.clear()
    save(tmp_path, 2, *content(2), keep=1, hooks=events.append)
    before, after = events[: events.index("before_rename")], events[events.index("before_rename") :]
    files = {"model.safetensors", "ema.safetensors", "state.json", "manifest.json"}
    assert files <= set(before) and before[-1] == ".tmp-step-2"  # the folder last: it names its files
    assert after == ["before_rename", "checkpoints", "after_rename", "before_prune"]


def test_a_crash_while_deleting_the_old_one_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def half(folder):
        (folder / "state.json").unlink()
        raise OSError("killed")

    save(tmp_path, 1, *content(1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(checkpoint.shutil, "rmtree", half)
        save(tmp_path, 2, *content(2), keep=1)
    assert [name for name in names(tmp_path) if name.startswith("step-")] == ["step-2"]
    assert_is(latest(tmp_path), 2)


@pytest.mark.parametrize("point", checkpoint.POINTS)
def test_an_exception_while_saving_leaves_the_former_or_the_new_checkpoint_whole(tmp_path, point):
    def hook(name):
        if name == point:
            raise OSError("disk full")

    save(tmp_path, 1, *content(1))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, *content(2), keep=1, hooks=hook)
    assert_is(latest(tmp_path), 2 if point in ("after_rename", "before_prune") else 1)


# --------------------------------------------------------------------------------------------- pickle


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was called")

    model, optimizer = trained(3)
    for module, functions in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in functions:
            monkeypatch.setattr(module, name, refuse)
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    sections = {"model": pack_parameters(model.named_parameters()), "optimizer": tensors}
    path = save(tmp_path, 3, sections, {"optimizer": state})
    back, back_state = load(path)
    restore_optimizer(optimizer, model.named_parameters(), back["optimizer"], back_state["optimizer"])
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert file.suffix in (".json", ".safetensors")
            assert not zipfile.is_zipfile(file) and not file.read_bytes().startswith(b"\x80")
