"""A run of tests/data/tiny.yaml on a tiny pipeline, and what it left in its folder."""

from pathlib import Path

from flowalign.config import load_config
from flowalign.loop import train
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


def run_it(pipeline: Path, output: Path, *overrides: str) -> dict:
    return train(*load_config(CONFIG, [f"policy.path={pipeline}", f"run.output={output}", *overrides]))


def result(output: Path) -> tuple[dict, dict, list]:
    """What two equal runs agree on: final tensors, final state and metrics, less the clock."""
    tensors, state = checkpoint.load(checkpoint.latest(output / "tiny"))
    flat = {f"{section}/{name}": value for section, part in tensors.items() for name, value in part.items()}
    state = {key: value for key, value in state.items() if not key.startswith("time/")}
    return flat, state, [without_time(row) for row in read_rows(output / "tiny" / "metrics.jsonl")]
