"""A reward as the engine of a worker (see `rewards.workers.worker`): built from its description, asked in bytes.

Runs in the environment that the worker's interpreter has, so it imports nothing before `Engine()`.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Engine:
    """({}, uint8 bytes of a batch) -> ({}, uint8 bytes of an output), or ({"failed": what the reward says}, nothing)."""

    def __init__(self, package: str, path: list[str], description: dict[str, Any]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        import_package(Path(package))
        from rewards.remote.description import build

        self.reward = build(description)
        self.reward.load()

    def __call__(self, header: dict[str, Any], array: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        from rewards import RewardError, score
        from rewards.remote import wire

        try:
            answer = score(self.reward, wire.decode_batch(array.tobytes(), wire.UNLIMITED), max_fail_rate=1.0)
        except RewardError as error:
            return {"failed": str(error)}, np.zeros(0, dtype=np.uint8)
        return {}, np.frombuffer(wire.encode_output(answer), dtype=np.uint8)


def import_package(folder: Path) -> None:
    """The caller's own `rewards`, from its folder: of the same version, and without what lies beside it (site-packages of
    the caller's environment, say)."""
    spec = importlib.util.spec_from_file_location("rewards", folder / "__init__.py")
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewards"] = module
    spec.loader.exec_module(module)
