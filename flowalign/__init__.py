"""flowalign aligns diffusion and flow-matching models with rewards: a rollout is a tree, a method a configuration."""

import importlib
from typing import Any

for _name in ("samplers", "rewards"):
    if vars(importlib.import_module(_name)).get("PART_OF") != "flowalign":
        raise ImportError(
            f"got another module {_name!r} ({importlib.import_module(_name).__file__}), which is not flowalign's; expected "
            "flowalign's own: rename or remove the other, or put flowalign's folder first on the path"
        )

_PUBLIC = {
    "load_policy": "flowalign.models",
    **dict.fromkeys(
        ("optimize_noise", "Gradient", "Ascent", "SPSA", "BestOfN", "ZeroOrder", "PreviewSelect", "PathSearch"),
        "flowalign.noise_optimization",
    ),
    **dict.fromkeys(("Images", "LoRA", "Role", "Sampling", "Size"), "flowalign.models"),
    "as_records": "flowalign.data",
    "evaluate": "flowalign.evaluation.evaluate",
    "evaluate_columns": "flowalign.run.evaluate_columns",
    "load_config": "flowalign.config",
    "load_run": "flowalign.run.load",
    "train": "flowalign.loop",
    **dict.fromkeys(("ODE", "FlowSDE", "ClippedFlowSDE", "DanceSDE", "LinearSDE", "CPS", "DDIM"), "samplers"),
    **dict.fromkeys(("DPMSolver", "Guided", "chain", "window", "rollout"), "samplers"),
    **dict.fromkeys(("OCR", "Reward", "RewardBatch"), "rewards"),
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import flowalign` stays cheap."""
    if name in _PUBLIC:
        return vars(importlib.import_module(_PUBLIC[name]))[name]
    raise AttributeError(f"module 'flowalign' has no attribute {name!r}")
