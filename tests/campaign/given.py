"""The folder that every case starts from: tiny.yaml, a tiny pipeline, two prompt files, and a finished run."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.campaign.case import FLOWALIGN
from tests.helpers.forks import ROOT, Forks
from tests.helpers.tiny import tiny_sd3

PROMPTS = [f'the word "{word}" in red on a yellow background' for word in ("KITE", "MOON", "FERN", "LAMP")]


def make(folder: Path, forks: Forks) -> Path:
    folder.mkdir(parents=True)
    tiny_sd3(folder / "pipeline")
    config = yaml.safe_load((ROOT / "tests" / "data" / "tiny.yaml").read_text())
    config["policy"]["path"] = "pipeline"
    config["run"] |= {"iterations": 1, "output": "runs"}
    config["evaluation"] |= {"count": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "train.txt").write_text("\n".join(PROMPTS[:2]))
    (folder / "held_out.txt").write_text("\n".join(PROMPTS[2:]))
    forks.check("-c", FLOWALIGN, "train", "tiny.yaml", "run.name=done", "run.iterations=2", folder=folder)
    return folder
