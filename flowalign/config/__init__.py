"""Configuration: YAML files plus overrides become typed, checked objects.

load.py goes the way from one to the other; beside it the settings, and what each step needs: yaml_text.py reads YAML within bounds,
layers.py merges files, overrides.py puts key=value in, nodes.py checks each key against types.py, parser.py makes the objects,
contracts.py says what a class lacks, checks.py and sizes.py what cannot work."""

from flowalign.config.load import load_config, load_judges, load_reward
from flowalign.config.settings import (
    EvaluationSettings,
    PolicySettings,
    RunSettings,
    TrainConfig,
    evaluation_schedule,
)

__all__ = [
    "EvaluationSettings", "PolicySettings", "RunSettings", "TrainConfig", "evaluation_schedule", "load_config",
    "load_judges", "load_reward",
]  # fmt: skip
