"""The folder that every case starts from: tiny.yaml, a tiny pipeline, two prompt files, and a finished run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.campaign.case import ROOT
from tests.helpers.tiny import tiny_sd3

PROMPTS = [f'the word "{word}" in red on a yellow background' for word in ("KITE", "MOON", "FERN", "LAMP")]


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tiny_sd3(folder / "pipeline")
    config = yaml.safe_load((ROOT / "tests" / "data" / "tiny.yaml").read_text())
    config["policy"]["path"] = "pipeline"
    config["run"] |= {"iterations": 1, "output": "runs"}
    config["evaluation"] |= {"count": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "train.txt").write_text("\n".join(PROMPTS[:2]))
    (folder / "held_out.txt").write_text("\n".join(PROMPTS[2:]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flowalign.cli", "train", "tiny.yaml", "run.name=done", "run.iterations=2"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder
