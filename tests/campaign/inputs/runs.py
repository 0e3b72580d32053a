"""A finished run that is damaged, and then asked to go on, to be reported or exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.campaign.case import Case

ON = ("run.name=done", "run.iterations=3")
RUN, LAST = "runs/done", "runs/done/checkpoints/step-2"
NEEDED = [  # what going on reads
    f"{RUN}/config.yaml", f"{RUN}/metrics.jsonl", f"{RUN}/evaluations.jsonl", f"{RUN}/evaluation/base.safetensors",
    f"{LAST}/manifest.json", f"{LAST}/state.json", f"{LAST}/role_policy.safetensors",
    f"{LAST}/optimizer_policy.safetensors",
]  # fmt: skip
MADE_AGAIN = [  # what it writes anew
    f"{RUN}/report.html", f"{RUN}/summary.json", f"{RUN}/evaluation/tuned.safetensors", f"{RUN}/grids/held_out.png",
    f"{RUN}/grids/grids.json", f"{RUN}/lora/pytorch_lora_weights.safetensors", f"{RUN}/trees/iteration-1.png",
]  # fmt: skip


def removed(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flipped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)

    return damage


def folder_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def renamed(folder: Path) -> None:
    (folder / LAST).rename(folder / RUN / "checkpoints" / "step-9")


def file_instead(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        removed(name)(folder)
        written(name, b"x")(folder)

    return damage


def not_finite(folder: Path) -> None:
    """A checkpoint that says it is whole, with a weight that is NaN."""
    import hashlib

    path = folder / LAST / "role_policy.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, path)
    manifest = json.loads((folder / LAST / "manifest.json").read_text())
    manifest["parts"][path.name] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / LAST / "manifest.json").write_text(json.dumps(manifest))


def go_on(name: str, damage: Callable[[Path], None] | None, says: str, *overrides: str, fine: bool = False) -> Case:
    return Case(f"go on: {name}", (*ON, *overrides), damage=damage, says=says, fine=fine)


def base(path: str) -> str:
    return path.rpartition("/")[2]


CASES = [
    go_on("untouched", None, "", fine=True),
    *(go_on(f"{name} is missing", removed(name), base(name)) for name in NEEDED if base(name) != "config.yaml"),
    go_on("config.yaml is missing", removed(f"{RUN}/config.yaml"), "config.yaml"),
    *(go_on(f"{name} is cut", cut(name), base(name)) for name in NEEDED if not name.endswith(".jsonl")),
    *(go_on(f"{name} is empty", written(name, b""), base(name)) for name in NEEDED),
    *(go_on(f"{name} is garbage", written(name, b"\xff\x00garbage" * 50), base(name)) for name in NEEDED),
    *(go_on(f"{name} is a folder", folder_instead(name), base(name)) for name in NEEDED),
    *(go_on(f"a bit of {name} is flipped", flipped(name), base(name)) for name in NEEDED if name.startswith(LAST)),
    *(go_on(f"{name} is missing", removed(name), "", fine=True) for name in MADE_AGAIN),
    *(go_on(f"{name} is garbage", written(name, b"\xff\x00garbage"), base(name), fine=not name.endswith("grids.json"))
      for name in MADE_AGAIN),
    go_on("the last checkpoint is missing", removed(LAST), "", fine=True),
    go_on("all checkpoints are missing", removed(f"{RUN}/checkpoints"), "checkpoint"),
    go_on("provenance.json is garbage", written(f"{RUN}/provenance.json", b"{"), "provenance.json"),
    go_on("provenance.json is a list", written(f"{RUN}/provenance.json", b"[]"), "provenance.json"),
    go_on("a weight is NaN", not_finite, "finite|nan|NaN"),
    go_on("a file in a checkpoint", written(f"{LAST}/extra.bin", b"x"), "extra.bin"),
    go_on("a renamed checkpoint", renamed, "iteration 9", "run.iterations=12"),  # type: ignore[func-returns-value]
    go_on("the folder is a file", file_instead(RUN), "done"),
    go_on("runs is a file", file_instead("runs"), "runs"),
    go_on("config.yaml of another run", written(f"{RUN}/config.yaml", b"run: {name: other}"), "config.yaml"),
    go_on("config.yaml is a list", written(f"{RUN}/config.yaml", b"[1]"), "config.yaml"),
    go_on("fewer iterations", None, "iterations", "run.iterations=1"),
    go_on("another rank", None, "rank", "policy.lora.rank=2"),
    go_on("another learning rate", None, "resume=changed", "trainer.optimizer.lr=1e-5"),
    go_on("another learning rate, meant", None, "", "trainer.optimizer.lr=1e-5", "run.resume=changed", fine=True),
    go_on("another seed", None, "seed", "run.seed=5"),
    go_on("other prompts", None, "prompts", "prompts=train.txt"),
    go_on("another evaluation", None, "evaluation", "evaluation.seed=5"),
    go_on("another trainer part", None, "objective", "trainer.objective=flowalign.objectives.Guard"),
    go_on("other micro-batches", None, "", "rollout.micro_batch=2", "trainer.micro_batch=2", fine=True),
    go_on("never", None, "never", "run.resume=never"),
    go_on("resume misspelt", None, "resume", "run.resume=allways"),
    Case("report", arguments=("report", RUN), fine=True),
    Case("report of nothing", arguments=("report", "runs/nothing"), says="nothing"),
    Case("report without a run", arguments=("report",), says="usage"),
    Case("report of a file", arguments=("report", "tiny.yaml"), says="tiny.yaml"),
    Case("report of no run", arguments=("report", "pipeline"), says="pipeline"),
    Case("report with garbage", arguments=("report", RUN), damage=written(f"{RUN}/summary.json", b"{"), says="summary.json"),
    Case("report with garbled metrics", arguments=("report", RUN), damage=written(f"{RUN}/metrics.jsonl", b"{\n{\n"), says="metrics.jsonl"),
    Case("export", arguments=("export", RUN), fine=True),
    Case("export a step", arguments=("export", RUN, "--step", "1"), fine=True),
    Case("export a step that is not there", arguments=("export", RUN, "--step", "7"), says="7"),
    Case("export a step that is no number", arguments=("export", RUN, "--step", "last"), says="step|last"),
    Case("export an average that is not there", arguments=("export", RUN, "--ema"), says="ema|average"),
    Case("export of nothing", arguments=("export", "runs/nothing"), says="nothing"),
    Case("export without a run", arguments=("export",), says="usage"),
    Case("export with an unknown option", arguments=("export", RUN, "--stp", "1"), says="stp"),
    Case("export of a cut checkpoint", arguments=("export", RUN), damage=cut(f"{LAST}/role_policy.safetensors"), says="role_policy"),
]  # fmt: skip
